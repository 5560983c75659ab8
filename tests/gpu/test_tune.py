"""``sinterlm tune`` without a device: which candidates there are, the search, journal and choice
with scripted times, and the process that times them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sinterlm.artifact.progress import LogProgress
from sinterlm.backends.gpu.devices import DEVICES
from sinterlm.backends.gpu.launch import launch_table
from sinterlm.backends.gpu.objects import Object
from sinterlm.backends.gpu.table import Kernel
from sinterlm.backends.gpu.tuning import (
    MEASURED,
    Entry,
    find_tiles,
    parse_tiles,
    read_tiles,
    tuned_path,
)
from sinterlm.errors import ResourceError, UsageError
from sinterlm.ir.quant import ActDType
from sinterlm.options import CompileOptions
from sinterlm.passes.formats import Scheme
from sinterlm.runtime.device_probe import Step
from sinterlm.tune import session
from sinterlm.tune.catalogue import Sizes
from sinterlm.tune.choice import choose, tuned_table
from sinterlm.tune.gemm import GemmCut as Cut
from sinterlm.tune.journal import Journal, Result
from sinterlm.tune.search import Search, Tuner, key_of
from sinterlm.tune.tasks import copies_of
from tests.gpu.models import fp8, tiny
from tests.gpu.tuned import ScriptedTimer, all_tasks, no_code, tasks


def wide_is_fast(kernel: Kernel, tokens: int) -> float:
    """Microseconds that have one minimum: BN 64, BK 64, 8 warps."""
    cut = Cut.of(kernel)
    return 100 + abs(cut.BN - 64) + abs(cut.BK - 64) + 10 * abs(cut.num_warps - 8) + tokens / 100


def tuner(
    path: Path, timer: ScriptedTimer, seconds: float = 60, compile: Callable = no_code
) -> Tuner:
    journal = Journal(path / "journal", timer.device)
    return Tuner(compile, timer, journal, time.monotonic() + seconds, lambda _: None, timer.device,
                 "driver 1")  # fmt: skip


# -- tasks and candidates --------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["gfx942", "sm_90", "gfx1201"])
@pytest.mark.parametrize("scheme", [None, Scheme(4, act="graph")])
def test_every_gemm_has_a_task_per_number_of_rows(device: str, scheme: Scheme | None) -> None:
    found = tasks(device, model="qwen2-window", scheme=scheme)
    assert len(found) == 5 * 3 and len({t.name for t in found}) == 15
    for task in found:
        assert task.rows == {16: (1, 16), 64: (64,), 0: (100,)}[task.max_rows]
        assert task.matrix.name.rpartition(".")[2] in ("qkv", "o", "gate_up", "down", "lm_head")
        assert Search(task, 1).next(9)[0][1].constants == task.start.constants


@pytest.mark.parametrize(("act", "stored"), [("graph", "fp8"), ("fp8", "fp8-a8")])
def test_fp8_has_entries_of_its_own(act: ActDType, stored: str) -> None:
    found = tasks("gfx942", model="qwen2-window", scheme=fp8("gfx942", act=act))
    assert {t.stored for t in found} == {stored, "codes"}
    for task in found:
        (_, first), *others = Search(task, 9).next(9)
        assert first.constants == task.start.constants
        if task.stored == "fp8-a8":
            assert {k.constants["BK"] for _, k in others} <= {first.constants["BK"]}


def test_what_is_timed_is_what_would_be_compiled() -> None:
    """An entry of each candidate, in the whole model's table, gives that candidate's kernel."""
    model = tiny("qwen2-window", "gfx942")
    for task in tasks(model="qwen2-window"):
        for _, kernel in Search(task, 99).next(6):
            entry = task.entry(kernel, "measured")
            if task.is_head:  # another BN would be cut to that of the other rows
                continue
            tiles = replace(read_tiles("gfx942"), entries=(entry, *read_tiles("gfx942").entries))
            table = launch_table(model.plan, DEVICES["gfx942"], tiles)
            choice = next(c for c in table.choices
                          if (c.slot, c.most) == (task.slot, task.max_rows))  # fmt: skip
            made = table.kernels[choice.kernel]
            assert (made.constants, made.options) == (kernel.constants, kernel.options)
            # No other GEMM takes it: it is for this shape.
            others = {c.kernel for c in table.choices if c.slot != task.slot}
            assert all(table.kernels[i].source != "measured" for i in others)


def test_a_trial_holds_its_own_weights_and_copies() -> None:
    (task,) = tasks(ops=["down_residual"], sizes=[16])
    trial = task.trial(task.start)
    table, ((step, train),) = trial.table, trial.steps
    assert step == Step(16)
    (launch,) = table.launches
    offsets = [int(arg.partition(":")[2]) for arg in launch.args if arg.startswith("weight:")]
    assert offsets[0] == 0 and max(offsets) < train.copy_bytes
    assert table.facts["weights_bytes"] == train.copies * train.copy_bytes
    assert train.copies == 256 and train.launches == 256  # a tiny matrix: as many as there may be
    assert len(table.kernels) == len(table.choices) == 1 and table.facts["layers"] == 1
    assert copies_of(200 << 20) == 3
    assert type(table).from_text(table.to_text()) == table


def test_candidates_are_legal_and_near_ones_come_first() -> None:
    for task in tasks("sm_90"):
        search = Search(task, 99)
        assert search.space[0] == Cut.of(task.start)
        assert len(set(search.space)) == len(search.space)
        first = [Cut.of(task.start).steps_to(cut) for cut, _ in search.next(9)]
        near = [steps for i, steps in enumerate(first) if i % 3 != 2]
        assert near == sorted(near) and near[0] == 0
        assert search.next(9) == Search(task, 99).next(9), "the same in another run"
        for cut in search.space[1:]:
            assert task.columns % cut.BN == 0 and task.depth % cut.BK == 0
            assert cut.SPLIT == 1 or task.max_rows


def test_a_head_norm_forces_the_width() -> None:
    """QK_NORM needs both halves of a head: other widths are no candidates."""
    (task,) = tasks(ops=["norm_qkv_rope_kv"], sizes=[1], model="qwen3")
    assert task.start.constants["QK_NORM"]
    assert {cut.BN for cut, _ in Search(task, 99).next(99)} == {16}


def test_unknown_ops_and_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="did you mean o_residual"):
        tasks(ops=["o_residul"])
    with pytest.raises(UsageError, match="--batch-sizes 0"):
        tasks(sizes=[0])
    for flag, sizes in (("--context-lens 5,0", Sizes(contexts=(5, 0))),
                        ("--prompt-lens  ", Sizes(prompts=()))):  # fmt: skip
        with pytest.raises(UsageError, match=flag):
            all_tasks(sizes=sizes)


# -- the search ------------------------------------------------------------------------------------


def test_the_best_is_found_and_accepted_by_the_compiler(tmp_path: Path) -> None:
    timer = ScriptedTimer(wide_is_fast)
    searches = [Search(task, 40) for task in tasks(ops=["norm_gate_up_act"])]
    assert tuner(tmp_path, timer).run(searches, 4)
    table = tuned_table("gfx942", choose(searches), None)
    path = tmp_path / "tiles.json"
    path.write_text(table.to_json())
    assert parse_tiles(path.read_text()) == table and table.status == "tuned"
    assert table.device == "scripted" and table.driver == "driver 1"
    found = find_tiles("gfx942", path, tmp_path)
    compiled = launch_table(tiny("llama-tied", "gfx942").plan, DEVICES["gfx942"], found)
    tuned = [k for k in compiled.kernels if k.source.startswith(MEASURED + "scripted")]
    assert [k.name for k in tuned] == ["norm_gate_up_act"] * 3
    for kernel in tuned:
        cut = Cut.of(kernel)
        assert (cut.BN, cut.BK, cut.num_warps) == (64, 64, 8)
    entry = table.entries[0]
    assert list(entry.us) == ["1", "16"] and entry.us["16"] == pytest.approx(100.16)
    nbytes = searches[0].task.matrix.nbytes
    assert entry.gb_per_s["16"] == round(nbytes / entry.us["16"] / 1e3, 1)


def test_a_rerun_measures_nothing_again(tmp_path: Path) -> None:
    first, again, elsewhere = (ScriptedTimer(wide_is_fast) for _ in range(3))
    elsewhere.device = "another"

    def found(timer: ScriptedTimer) -> list[Result]:
        searches = [Search(task, 12) for task in tasks(ops=["o_residual"], sizes=[1])]
        assert tuner(tmp_path, timer).run(searches, 3)
        return [result for *_, result in choose(searches)]

    best = found(first)
    assert len(first.asked) == 12
    with (tmp_path / "journal").open("a") as file:
        file.write('{"key": "cut o')  # the writer was killed
    assert found(again) == best and again.asked == []
    assert len(found(elsewhere)) == 1 and len(elsewhere.asked) == 12
    assert len(Journal(tmp_path / "journal", "scripted")) == 12


def test_time_is_up(tmp_path: Path) -> None:
    searches = [Search(task, 40) for task in tasks()]
    timer = ScriptedTimer(wide_is_fast)
    assert not tuner(tmp_path, timer, seconds=-1).run(searches, 4)
    assert choose(searches) == [] and timer.asked == []
    some = tuner(tmp_path, timer)
    some.say = lambda _: setattr(some, "deadline", 0.0)  # after the first candidate
    assert not some.run(searches, 4)
    assert len(timer.asked) == 1 and len(choose(searches)) == 1


def test_a_candidate_that_fails_is_not_tried_again(tmp_path: Path) -> None:
    def takes(kernel: Kernel, tokens: int) -> float | str:
        return "the device fell over" if Cut.of(kernel).num_warps == 4 else 1.0

    searches = [Search(task, 20) for task in tasks(ops=["down_residual"], sizes=[16])]
    tuner(tmp_path, ScriptedTimer(takes)).run(searches, 4)
    states = [result.state for _, result in searches[0].tried.values()]
    assert "failed" in states and "measured" in states
    ((_, kernel, _),) = choose(searches)
    assert Cut.of(kernel).num_warps != 4
    again = ScriptedTimer(takes)
    tuner(tmp_path, again).run([Search(task, 20) for task in tasks(ops=["down_residual"],
                                                                   sizes=[16])], 4)  # fmt: skip
    assert again.asked == []


def test_what_does_not_compile_is_never_timed(tmp_path: Path) -> None:
    def compile(kernels: list[Kernel]) -> list[Object | str]:
        return [o if Cut.of(o.kernel).SPLIT == 1 else "3 spills, 0 bytes of stack"
                for o in no_code(kernels) if isinstance(o, Object)]  # fmt: skip

    searches = [Search(task, 20) for task in tasks(ops=["o_residual"], sizes=[16])]
    timer = ScriptedTimer(lambda kernel, tokens: 1.0 / Cut.of(kernel).SPLIT)
    tuner(tmp_path, timer, compile=compile).run(searches, 4)
    assert {cut.SPLIT for cut in timer.asked} == {1}
    refused = [r for _, r in searches[0].tried.values() if r.state == "refused"]
    assert refused and refused[0].why == "3 spills, 0 bytes of stack"


def test_the_head_has_one_width(tmp_path: Path) -> None:
    """Each number of rows would choose another BN; one serves all, as one merge reads them."""

    def takes(kernel: Kernel, tokens: int) -> float:
        return 10.0 + abs(Cut.of(kernel).BN - (32 if tokens <= 16 else 64))

    searches = [Search(task, 60) for task in tasks(ops=["norm_lm_head_sample"], model="qwen3")]
    tuner(tmp_path, ScriptedTimer(takes)).run(searches, 8)
    assert {Cut.of(kernel).BN for _, kernel, _ in choose(searches)} == {64}
    few = choose(searches[:1])  # the others keep theirs, so this one does, too
    assert Cut.of(few[0][1]).BN == Cut.of(searches[0].task.start).BN


def test_other_models_entries_are_kept(tmp_path: Path) -> None:
    def table(model: str, takes: Callable, before: object = None, device: str = "scripted"):  # type: ignore[no-untyped-def]
        searches = [Search(t, 4) for t in tasks(ops=["o_residual"], sizes=[1], model=model)]
        timer = ScriptedTimer(takes, device)
        tuner(tmp_path / model, timer).run(searches, 4)
        return tuned_table("gfx942", choose(searches), before)  # type: ignore[arg-type]

    one = table("llama-tied", wide_is_fast)
    two = table("qwen3", wide_is_fast, one)
    assert len(one.entries) == 1 and len(two.entries) == 2
    assert len(table("qwen3", wide_is_fast, two).entries) == 2, "its own is replaced"
    other = table("qwen3", wide_is_fast, two, device="another")
    assert len(other.entries) == 1, "times of two devices do not mix"


# -- the session -----------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., session.Outcome]:
    """``tune`` of a named config with scripted times and a compiler that takes everything."""
    monkeypatch.setattr(session.objects, "compile_each", lambda kernels, *_: no_code(kernels))
    monkeypatch.setattr(session.library, "host_library", lambda _: b"")

    def tune(takes: Callable[[Kernel, int], float | str], **wanted: Any) -> session.Outcome:
        options = CompileOptions("llama-3.1-8b", target="sm_90", load_format="dummy",
                                 cache_dir=tmp_path)  # fmt: skip
        given = session.TuneOptions(**{"ops": ("o_residual",), "max_candidates": 5, **wanted})
        return session.tune(options, given, LogProgress(), lambda *_: ScriptedTimer(takes))

    return tune


def test_a_session(run: Callable[..., session.Outcome], tmp_path: Path) -> None:
    outcome = run(wide_is_fast)
    assert outcome.output == tuned_path(tmp_path, "sm_90") and outcome.is_complete
    assert outcome.counts == {"measured": 15, "refused": 0, "failed": 0}
    assert [row["task"] for row in outcome.rows] == ["o_residual <= 16", "o_residual <= 64",
                                                     "o_residual any"]  # fmt: skip
    for row in outcome.rows:
        assert sum(row["us"].values()) < sum(row["start_us"].values())
    found = find_tiles("sm_90", None, tmp_path)
    assert (found.status, len(found.entries)) == ("tuned", 3 + len(read_tiles("sm_90").entries))
    assert json.loads(session.to_json(outcome))["device"] == "scripted"


def test_an_interrupted_session_keeps_what_it_has(
    run: Callable[..., session.Outcome], tmp_path: Path
) -> None:
    times = iter([1.0, 2.0])

    def takes(kernel: Kernel, tokens: int) -> float:
        try:
            return next(times)
        except StopIteration:
            raise KeyboardInterrupt from None

    with pytest.raises(KeyboardInterrupt):
        run(takes)
    (entry,) = read_entries(tmp_path)
    assert entry.us == {"1": 1.0, "16": 2.0}
    outcome = run(wide_is_fast)
    assert outcome.counts["measured"] == 15
    assert next(e for e in read_entries(tmp_path) if e.max_rows == 16).us == entry.us


def read_entries(cache: Path) -> tuple[Entry, ...]:
    return parse_tiles(tuned_path(cache, "sm_90").read_text()).entries


def test_a_session_that_measures_nothing_says_why(
    run: Callable[..., session.Outcome], tmp_path: Path
) -> None:
    with pytest.raises(ResourceError, match="within --time-limit"):
        run(wide_is_fast, time_limit_s=1e-9)
    with pytest.raises(ResourceError, match=r"none of 15 candidates .* any: it fell"):
        run(lambda kernel, tokens: "it fell")
    assert not tuned_path(tmp_path, "sm_90").exists()
    with pytest.raises(UsageError, match="--max-candidates 0"):
        run(wide_is_fast, max_candidates=0)
    (tmp_path / "other").write_text("{}")
    with pytest.raises(UsageError, match="other is no tile table"):
        run(wide_is_fast, output=tmp_path / "other")


# -- tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no tile table"),
        ('{"target": "gfx942"}', "no list of entries"),
        ('{"status": "tuned", "entries": []}', "no target"),
        ('{"target": "sm_90", "status": "tuned", "entries": []}', "has tiles for sm_90"),
        ('{"target": "gfx942", "status": "tuned", "entries": [{"kernel": "x"}]}', "an entry is"),
        ('{"target": "gfx942", "status": "tuned", "entries": [{"kernel": "x", "max_rows": 16, '
         '"tile": {"BM": 16, "BN": 48, "BK": 64, "GROUP_M": 1, "MIN_PROGRAMS": 1, "MAX_SPLIT": 1}, '
         '"options": {"num_warps": 4, "num_stages": 2}, "source": ""}]}', "no usable BN"),
    ],
)  # fmt: skip
def test_a_damaged_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tuned_path(tmp_path, "gfx942")
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        find_tiles("gfx942", None, tmp_path)
    assert "sinterlm tune" in str(caught.value)
    with pytest.raises(UsageError, match="cannot read"):
        find_tiles("gfx942", tmp_path / "none.json", tmp_path)


@pytest.mark.parametrize("device", list(DEVICES))
def test_shipped_tables_are_written_as_they_are_read(device: str) -> None:
    table = read_tiles(device)
    assert parse_tiles(table.to_json()) == table
    assert find_tiles(device, None, Path("/nonexistent")) == table


def test_a_kernel_keeps_its_key_and_another_has_another() -> None:
    (task,) = tasks(ops=["o_residual"], sizes=[16])
    cut = Cut.of(task.start)
    keys = set()
    for changed in (cut, replace(cut, num_warps=2), replace(cut, BN=64)):
        kernel = task.kernel_of(changed)
        assert kernel is not None
        keys.add(key_of(task, kernel))
        assert key_of(task, replace(kernel, source="elsewhere")) in keys
    assert len(keys) == 3
