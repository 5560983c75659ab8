"""``sinterlm tune`` of attention without a device: tasks, candidates, entries, a session."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sinterlm.artifact.progress import LogProgress
from sinterlm.backends.gpu.devices import DEVICES
from sinterlm.backends.gpu.launch import launch_table
from sinterlm.backends.gpu.table import Kernel
from sinterlm.backends.gpu.tuning import MEASURED, find_tiles, parse_tiles, read_tiles
from sinterlm.options import CompileOptions
from sinterlm.runtime.device_probe import PAGE, Step
from sinterlm.tune import session
from sinterlm.tune.attention import AttentionCut
from sinterlm.tune.catalogue import Sizes
from sinterlm.tune.choice import choose, tuned_table
from sinterlm.tune.journal import Journal
from sinterlm.tune.search import Search, Tuner
from sinterlm.tune.tasks import LEAST_LAUNCHES, ROTATED_BYTES
from tests.gpu.models import tiny
from tests.gpu.tuned import ScriptedTimer, attention, cut_of, no_code

MANY = Sizes((1, 16, 64, 512), (2048, 8192), (512, 2048))
DECODE = {"T": 1, "R": 1, "S": 1, "N": 0}


def test_decoding_rows_have_two_kernels_and_prompts_one() -> None:
    few, many, prompts = attention(sizes=MANY)
    assert [t.name for t in (few, many, prompts)] == [
        "attention decode <= 16", "attention decode any", "attention prompts"]  # fmt: skip
    assert [few.label(s) for s in few.steps] == ["1x2048", "1x8192", "16x2048", "16x8192"]
    assert many.steps == (Step(64, 0, 64, 2048), Step(64, 0, 64, 8192))
    assert [prompts.label(s) for s in prompts.steps] == ["512", "2048"]
    # llama-tied: 2 KV heads of 32, K and V, bf16; a prompt's time is not its bytes'.
    assert few.nbytes(Step(16, 0, 16, 2048)) == 16 * 2048 * 2 * 2 * 32 * 2
    assert prompts.nbytes(Step(512)) == 0
    halved = attention(sizes=MANY, kv_fp8=True)[0]
    assert halved.nbytes(Step(1, 0, 1, 2048)) == few.nbytes(Step(1, 0, 1, 2048)) // 2
    names = {t.name for t in attention(sizes=MANY, model="qwen2-window")}
    assert names >= {"attention prompts", "attention.window8 prompts"} and len(names) == 6


def test_windows_read_what_they_see() -> None:
    task = next(t for t in attention(sizes=MANY, model="qwen2-window") if "window8" in t.name)
    assert task.nbytes(Step(1, 0, 1, 8192)) == 8 * 2 * 2 * 64 * 2


@pytest.mark.parametrize("kv_fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("device", ["gfx942", "sm_90", "gfx1201"])
def test_what_is_timed_is_what_would_be_compiled(device: str, kv_fp8: bool) -> None:
    """An entry of each candidate, in the whole model's table, gives that candidate's kernel for the
    sequences that it was measured for; all other kernels stay."""
    model = tiny("qwen2-window", device, kv_fp8=kv_fp8)
    shipped = read_tiles(device)
    before = launch_table(model.plan, DEVICES[device], shipped)
    for task in attention(device, MANY, "qwen2-window", kv_fp8):
        (_, first), *others = Search(task, 99).next(8)
        assert first.constants == task.start.constants and len(others) == 7
        for _, kernel in others:
            entry = task.entry(kernel, "measured")
            tiles = replace(shipped, entries=(entry, *shipped.entries))
            table = launch_table(model.plan, DEVICES[device], tiles)
            kind = "decode" if task.is_decode else "any"
            choices = [c for c in table.choices if (c.slot, c.kind) == (task.slot, kind)]
            made = next(table.kernels[c.kernel] for c in choices if c.most == task.max_seqs)
            assert (made.constants, made.options) == (kernel.constants, kernel.options)
            assert len(choices) == (2 if task.max_seqs else 1)
            held = [(k.constants, k.options) for k in table.kernels if k.source != "measured"]
            known = [(k.constants, k.options) for k in before.kernels]
            assert all(one in known for one in held)
            assert type(table).from_text(table.to_text()) == table


def test_candidates_are_legal_and_near_ones_come_first() -> None:
    for device in ("gfx942", "sm_100"):
        for task in attention(device, MANY, "qwen2-window"):
            search = Search(task, 99)
            assert search.space[0] == task.cut_of(task.start)
            assert len(set(search.space)) == len(search.space) > 20
            near = [search.space[0].steps_to(c) for i, (c, _) in enumerate(search.next(9))
                    if i % 3 != 2]  # fmt: skip
            assert near == sorted(near) and near[0] == 0
            parts = {cut.SEGMENTS for cut in search.space if isinstance(cut, AttentionCut)}
            assert parts == ({1 << i for i in range(8)} if task.is_decode else {1})


def test_a_trial_rotates_through_pages() -> None:
    few, _, prompts = attention(sizes=MANY)
    trial = few.trial(few.start)
    token = few.nbytes(Step(1, 0, 1, 1))
    for step, train in trial.steps:
        sets = -(-ROTATED_BYTES // few.nbytes(step))
        assert train.launches == max(min(sets, 256), LEAST_LAUNCHES) and train.copies == 1
        assert trial.pages >= min(sets, 256) * step.pages
    assert trial.pages * PAGE * token < 2 * ROTATED_BYTES
    (launch,) = trial.table.launches
    assert {a for a in launch.args if a[:2] in ("k:", "v:")} == {"k:0", "v:0"}
    assert launch.args.count("number:1.0") == 2
    assert len(trial.table.kernels) == len(trial.table.choices) == 1
    assert type(trial.table).from_text(trial.table.to_text()) == trial.table
    assert prompts.trial(prompts.start).checked_rows == 2048


def many_ranges(kernel: Kernel, tokens: int) -> float:
    """Microseconds with one minimum: 32 keys, one warp, and as many ranges as few rows need."""
    cut = AttentionCut.of(kernel)
    wanted = 32 if tokens <= 16 else 4
    return 100 + abs(cut.TILE - 32) + 20 * cut.num_warps + abs(cut.SEGMENTS - wanted)


def test_the_best_is_found_and_compiled_for_its_sequences(tmp_path: Path) -> None:
    searches = [Search(task, 60) for task in attention(sizes=MANY)]
    timer = ScriptedTimer(many_ranges)
    tuner = Tuner(no_code, timer, Journal(tmp_path / "journal", "scripted"),
                  time.monotonic() + 60, lambda _: None, "scripted", "driver 1")  # fmt: skip
    assert tuner.run(searches, 4)
    table = tuned_table("gfx942", choose(searches), None)
    path = tmp_path / "tiles.json"
    path.write_text(table.to_json())
    assert parse_tiles(path.read_text()) == table
    plan = tiny("llama-tied", "gfx942").plan
    made = launch_table(plan, DEVICES["gfx942"], find_tiles("gfx942", path, tmp_path))
    for seqs, ranges in ((1, 32), (16, 32), (17, 4), (256, 4)):
        kernel = made.kernel_of("attention", {**DECODE, "T": seqs, "S": seqs}, True)
        assert kernel is not None and kernel.source.startswith(MEASURED)
        assert cut_of(kernel) == AttentionCut(1, kernel.options["num_stages"],
                                              kernel.options["waves_per_eu"], 16, 32,
                                              ranges)  # fmt: skip
    entry = next(e for e in table.entries if e.max_rows == 16)
    assert entry.kernel == "attention_decode" and list(entry.us) == list(entry.gb_per_s)
    assert next(e for e in table.entries if e.kernel == "attention").gb_per_s == {}
    # Another model's heads, and fp8 pages, keep what they have.
    for other in (tiny("qwen3", "gfx942"), tiny("llama-tied", "gfx942", kv_fp8=True)):
        found = launch_table(other.plan, DEVICES["gfx942"], find_tiles("gfx942", path, tmp_path))
        assert not any(k.source.startswith(MEASURED) for k in found.kernels)


def test_a_session_tunes_attention_beside_gemms(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(session.objects, "compile_each", lambda kernels, *_: no_code(kernels))
    monkeypatch.setattr(session.library, "host_library", lambda _: b"")
    options = CompileOptions("llama-3.1-8b", target="sm_90", load_format="dummy",
                             kv_cache_dtype="fp8", cache_dir=tmp_path)  # fmt: skip
    wanted = session.TuneOptions(ops=("attention", "o_residual"), max_candidates=3)
    for asked in (18, 0):
        timer = ScriptedTimer(lambda kernel, tokens: 10.0 / cut_of(kernel).num_warps)
        outcome = session.tune(options, wanted, LogProgress(), lambda *_, t=timer: t)
        assert len(timer.asked) == asked and outcome.counts["measured"] == 18
    rows = {row["task"]: row for row in outcome.rows}
    assert next(iter(rows)) == "attention decode <= 16" and len(rows) == 6
    assert set(rows["attention decode any"]["us"]) == {"64x2048", "64x8192"}
    assert rows["attention prompts"]["gb_per_s"] == {}
    assert json.loads(session.to_json(outcome))["rows"][0]["bytes"]["1x2048"] == 2048 * 8 * 128 * 2


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"kernel": "attention", "tile": {"BM": 128, "TILE": 64, "SEGMENTS": 2}}, "SEGMENTS"),
        ({"kernel": "attention_decode", "tile": {"BM": 16, "TILE": 48, "SEGMENTS": 4}}, "TILE"),
        ({"kernel": "attention_decode", "tile": {"BM": 16, "TILE": 64}}, "SEGMENTS"),
    ],
)
def test_entries_that_no_kernel_takes_are_refused(entry: dict, named: str) -> None:
    whole = {**entry, "max_rows": None, "options": {"num_warps": 4, "num_stages": 2}, "source": ""}
    with pytest.raises(ValueError, match=f"no usable {named}"):
        parse_tiles(json.dumps({"target": "gfx942", "status": "tuned", "entries": [whole]}))
