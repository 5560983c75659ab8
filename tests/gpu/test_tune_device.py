"""``sinterlm tune`` on a driver of no device whose clock is scripted: what an engineer with a
device will run, from a checkpoint to a table that compiling takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import pytest

from sinterlm.artifact.memo import Memo
from sinterlm.backends.gpu.devices import DEVICES
from sinterlm.backends.gpu.library import compile_host
from sinterlm.backends.gpu.objects import compile_objects
from sinterlm.backends.gpu.signatures import SIGNATURES
from sinterlm.backends.gpu.table import Table
from sinterlm.backends.gpu.tuning import MEASURED, read_tiles
from sinterlm.cli import main
from sinterlm.errors import ResourceError, RuntimeFault
from sinterlm.passes.formats import Scheme
from sinterlm.runtime.device_probe import PAGE, Step, TimedLibrary, Train
from sinterlm.tune import session, tasks
from sinterlm.tune.catalogue import AnyTask, Sizes
from sinterlm.tune.gemm import GemmCut as Cut
from sinterlm.tune.journal import Result
from sinterlm.tune.tasks import Task, nothing
from sinterlm.tune.timer import TrialFailed, WorkerTimer
from tests.conftest import ROOT
from tests.gpu.host import build_driver
from tests.gpu.models import fp8
from tests.gpu.recording import Launched, RecordingDriver
from tests.gpu.tuned import DriverTimer, attention
from tests.gpu.tuned import tasks as tasks_of

pytestmark = pytest.mark.usefixtures("triton")

TRAINED = ROOT / "tests/assets/tiny-llama"


@pytest.fixture
def driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[RecordingDriver]:  # fmt: skip
    """A driver without kernels, which does not run what it is given, and few copies of weights."""
    monkeypatch.setattr(tasks, "MOST_COPIES", 3)
    monkeypatch.setattr(tasks, "WARMUP_US", 0.0)
    device = DEVICES[getattr(request, "param", "gfx942")]
    made = RecordingDriver(device, Table(device.name, {}, (), (), (), ()), [])
    path = build_driver(tmp_path, device.vendor)
    made.attach(path)
    made.run, made.moves_weights = lambda _: None, True
    monkeypatch.setenv("SINTERLM_GPU_DRIVER", str(path))
    yield made


@pytest.fixture
def host(hosts: dict[str, bytes], tmp_path: Path) -> bytes:
    if "" not in hosts:
        compile_host(tmp_path / "host.so")
        hosts[""] = (tmp_path / "host.so").read_bytes()
    return hosts[""]


def time_start(timer: DriverTimer, task: Task, memo: Memo) -> list[list[float]]:
    made = compile_objects([task.start], DEVICES[task.target], memo)
    return timer.time(task.trial(task.start), made).samples


def test_one_candidate_is_timed(
    driver: RecordingDriver, host: bytes, memo: Memo, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """A train of launches by a graph, each with the next copy of the weights; the time of one is
    the events' over their number."""
    (task,) = tasks_of(ops=["o_residual"], sizes=[3, 16])
    trial = task.trial(task.start)
    driver.takes = lambda launched: 7.0 + launched.args[-3]  # num_tokens
    timer = DriverTimer(host, 60, driver)
    found = timer.time(nothing(read_tiles("gfx942")), [])
    assert (found.device, found.driver) == ("fake device", "HIP 12040")
    samples = time_start(timer, task, memo)
    assert samples == [[pytest.approx(10.0)] * 9, [pytest.approx(23.0)] * 9]
    assert driver.faults == [] and not driver.memory and not driver.pinned
    del driver.trace[:3]  # for its results, before it is timed
    (_, train), _ = trial.steps
    launches = train.launches * (9 + 1) + 1  # samples, one more to warm up, one alone
    assert len(driver.trace) == 2 * launches
    driver.trace.clear()
    monkeypatch.setattr(tasks, "WARMUP_US", 5 * 10.0 * train.launches)
    time_start(timer, task, memo)  # as many warm up as it takes: five, then three of 23 us a launch
    del driver.trace[:3]
    assert len(driver.trace) == 2 * (9 * train.launches + 1) + 8 * train.launches
    weights = [launched.args[1] - driver.trace[0].args[1] for launched in driver.trace]
    assert sorted(set(weights)) == [i * train.copy_bytes for i in range(3)]
    assert weights[1:5] == [0, *(i * train.copy_bytes for i in (1, 2)), 0]


def test_attention_is_timed_on_pages_of_its_own(
    driver: RecordingDriver, host: bytes, memo: Memo, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Sequences that lie anywhere, each launch with the next pages; of a prompt causally."""
    few, prompts = attention()
    monkeypatch.setattr(tasks, "ROTATED_BYTES", 3 * few.nbytes(few.steps[-1]))
    for task in (few, prompts):
        seen: list[dict[str, int]] = []
        steps = task.steps

        def run(launched: Launched, seen: Any = seen, steps: Any = steps) -> None:
            args = dict(zip(SIGNATURES["attention"].args, launched.args, strict=False))
            seen.append(args)
            seqs, stride = args["num_seqs"], args["table_stride"]
            starts, contexts, pages = (
                driver.bytes_from(args[name]).view("i4")
                for name in ("query_start", "context_lens", "page_table")
            )
            step = next(s for s in steps if (s.seqs, s.context) == (seqs, contexts[0]))
            assert starts[: seqs + 1].tolist() == [
                s * step.tokens // seqs for s in range(seqs + 1)]  # fmt: skip
            used = -(-step.context // PAGE)
            rows = pages[: seqs * stride].reshape(seqs, stride)[:, :used]
            assert sorted(rows.ravel()) == list(range(seqs * used))

        driver.run = run
        assert time_start(DriverTimer(host, 60, driver), task, memo)
        assert driver.faults == []
        moved = sorted({a["k_base"] - seen[0]["k_base"] for a in seen})
        assert len(moved) >= 3 and all(a["v_base"] - a["k_base"] == PAGE * 64 for a in seen)
    assert not driver.memory and not driver.pinned


@pytest.mark.parametrize("change", [0x8000, 0x7FFF])
def test_wrong_attention_is_a_failure(
    driver: RecordingDriver, host: bytes, memo: Memo, change: int
) -> None:
    """One number of the last row that the first candidate left otherwise."""
    task = attention()[1]
    timer = DriverTimer(host, 60, driver)
    assert time_start(timer, task, memo)

    def run(launched: Launched) -> None:
        y = driver.bytes_from(driver.bound["buffer:y"]).view("u2")
        at = 70 * 6 * 32 - 1
        y[at] = y[at] ^ 0x8000 if change == 0x8000 else change

    driver.run = run
    with pytest.raises(TrialFailed, match="buffer:y is off by"):
        time_start(timer, task, memo)


def interpret_start(driver: RecordingDriver, host: bytes, memo: Memo, task: AnyTask) -> None:
    """Its starting point, once in each step: every load within its buffer, and no NaN."""
    for step, train in task.trial(task.start).steps:

        def run(launched: Launched) -> None:
            driver.run = lambda _: None  # the first launch is as good as all
            driver.interpret(launched)

        driver.run = run
        made = compile_objects([task.start], DEVICES[task.target], memo)
        trial = replace(task.trial(task.start), steps=((step, train),))
        assert DriverTimer(host, 60, driver).time(trial, made).samples
        assert driver.faults == []


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["bf16", "int4", "fp8", "fp8-a8"])
@pytest.mark.parametrize("driver", ["gfx942", "sm_90"], indirect=True)
def test_every_kernel_takes_noise(
    driver: RecordingDriver, host: bytes, memo: Memo, stored: str
) -> None:
    name = driver.device.name
    schemes = {"int4": Scheme(4, act="graph"), "fp8": fp8(name), "fp8-a8": fp8(name, act="fp8")}
    for task in tasks_of(name, sizes=[2, 17], scheme=schemes.get(stored)):
        interpret_start(driver, host, memo, task)


@pytest.mark.slow
@pytest.mark.parametrize("kv_fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("driver", ["gfx942", "sm_90"], indirect=True)
def test_attention_takes_noise(
    driver: RecordingDriver, host: bytes, memo: Memo, kv_fp8: bool
) -> None:
    for task in attention(driver.device.name, Sizes((2, 17), (9, 100), (40,)), "qwen2-window",
                          kv_fp8):  # fmt: skip
        interpret_start(driver, host, memo, task)


def test_what_cannot_be_timed_is_named(
    driver: RecordingDriver, host: bytes, memo: Memo, tmp_path: Path
) -> None:
    (task,) = tasks_of(ops=["o_residual"], sizes=[16])
    timer = DriverTimer(host, 60, driver)
    driver.fails["graph_launch"] = 700
    with pytest.raises(TrialFailed, match="launching a graph: HIP error 700"):
        time_start(timer, task, memo)
    driver.fails.clear()
    assert time_start(timer, task, memo), "another one is timed"
    driver.fails["module_load"] = 209
    with pytest.raises(TrialFailed, match="compiled for gfx942"):
        time_start(timer, task, memo)


@pytest.mark.parametrize("change", [0x8000, 0x7FFF])
def test_wrong_results_are_failures(
    driver: RecordingDriver, host: bytes, memo: Memo, change: int
) -> None:
    """A sign, and NaN, in one number of the stream that the first candidate left otherwise."""
    (task,) = tasks_of(ops=["o_residual"], sizes=[16])
    timer = DriverTimer(host, 60, driver)
    assert time_start(timer, task, memo)

    def run(launched: Launched) -> None:
        stream = driver.bytes_from(driver.bound["buffer:x"]).view("u2")
        stream[3] = stream[3] ^ 0x8000 if change == 0x8000 else change

    driver.run = run
    with pytest.raises(TrialFailed, match="buffer:x is off by"):
        time_start(timer, task, memo)


def test_arguments_are_checked(
    driver: RecordingDriver, host: bytes, memo: Memo, tmp_path: Path
) -> None:
    (task,) = tasks_of(ops=["o_residual"], sizes=[16])
    made = compile_objects([task.start], task.device, memo)
    seen = []

    class Timer(DriverTimer):
        def _ask(self, job: dict[str, object]) -> dict[str, object]:
            driver.table, driver.kernels = (
                task.trial(task.start).table,
                [(made[0].kernel, made[0].code)],
            )
            with TimedLibrary(Path(str(job["library"])), [Step(16), Step(4, 0, 4)]) as library:
                for launch, step, train, why in (
                    (0, Step(1, 0, 5), Train(1, 0, 1, 1), "num_seqs is 5"),
                    (0, Step(3, 0, 2), Train(1, 0, 1, 1), "3 tokens are no multiple of 2"),
                    (0, Step(1, 0, 1, 4097), Train(1, 0, 1, 1), "context is 4097"),
                    (0, Step(4, 0, 4, 65), Train(1, 0, 1, 1), "room for 4 sequences of 65"),
                    (1, Step(1), Train(1, 0, 1, 1), "launch is 1"),
                    (0, Step(17), Train(1, 0, 1, 1), "num_tokens is 17"),
                    (0, Step(1, 17), Train(1, 0, 1, 1), "num_sample_rows is 17"),
                    (0, Step(1), Train(9, 1 << 20, 1, 1), "9 copies of 1048576 bytes"),
                    (0, Step(1), Train(1, 100, 1, 1), "1 copies of 100 bytes"),
                    (0, Step(1), Train(1, 0, 0, 1), "launches is 0"),
                    (0, Step(1), Train(1, 0, 1, 1, float("nan")), "warmup_us is nan"),
                ):
                    with pytest.raises(RuntimeFault, match=why):
                        library.time(launch, step, train)
                    seen.append(why)
            return {"device": "", "driver": "", "samples": []}

    Timer(host, 60, driver).time(task.trial(task.start), made)
    assert len(seen) == 11 and driver.trace == []


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["gfx942", "sm_90"], indirect=True)
def test_from_a_checkpoint_to_tiles_that_compile(
    driver: RecordingDriver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The second run finds all it needs in the journal; the compiler picks the table up."""
    driver.takes = lambda launched: 10.0 + 8 / Cut.of(launched.kernel).num_warps
    timer: Callable[..., DriverTimer] = lambda host, limit_s: DriverTimer(host, limit_s, driver)  # noqa: E731
    monkeypatch.setattr(session.tune, "__defaults__", (timer,))
    target, cache = driver.device.name, tmp_path / "cache"
    words = [str(TRAINED), "--target", target, "--cache-dir", str(cache)]
    more = ["--ops", "o_residual,norm_gate_up_act", "--batch-sizes", "2,40", "--json",
            "--max-candidates", "3"]  # fmt: skip
    assert main(["compile", *words, "--code-only", "--json"]) == 0
    untuned = json.loads(capsys.readouterr().out)
    assert main(["tune", *words, *more]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["is_complete"] and len(first["rows"]) == 4 and driver.faults == []
    launched = len(driver.trace)
    assert main(["tune", *words, *more]) == 0
    again = capsys.readouterr()
    assert "candidates are known" in again.err and len(driver.trace) == launched
    assert [row["us"] for row in json.loads(again.out)["rows"]] == [r["us"] for r in first["rows"]]
    table = json.loads((cache / f"tiles/{target}.json").read_text())
    assert table["status"] == "tuned" and table["device"] == "fake device"
    for entry in table["entries"]:
        assert entry["source"].startswith(MEASURED + "fake device")
        assert min(entry["us"].values()) > 0 and min(entry["gb_per_s"].values()) > 0
    lines = (cache / f"tiles/{target}.json.journal").read_text().splitlines()
    results = [Result(**json.loads(line)) for line in lines]
    for row in first["rows"]:
        times = [r.cost_us for r in results if (r.task, r.state) == (row["task"], "measured")]
        assert geometric_mean(row["us"].values()) == min(times)
    assert main(["compile", *words, "--code-only", "--json"]) == 0
    tuned = json.loads(capsys.readouterr().out)
    assert tuned["bundle_sha256"] != untuned["bundle_sha256"]
    assert main(["inspect", tuned["bundle"]]) == 0
    assert "tuned for" in capsys.readouterr().out


@pytest.mark.slow
def test_errors_of_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One message, exit code 2, and no table."""
    words = ["tune", str(TRAINED), "--cache-dir", str(tmp_path), "--target"]
    monkeypatch.setenv("SINTERLM_GPU_DRIVER", str(tmp_path / "libnone.so"))
    for more, said in (
        (["gfx942"], "no HIP driver"),
        (["cpu"], "has no tiles"),
        (["gfx942", "--bundle-sha256", "0" * 64], "no bundle is made"),
        (["gfx942", "--ops", "embed_norm"], "no such op to tune"),
        (["gfx942", "--time-limit", "0"], "--time-limit must be above 0"),
        (["gfx942", "--tiles", str(tmp_path / "none.json")], "cannot read the tile table"),
    ):
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*words, "gfx942", "--batch-sizes", "0"])
    assert "'0' is not a whole number, 1 or more" in capsys.readouterr().err
    assert not (tmp_path / "tiles").exists()


def test_the_real_worker_answers() -> None:
    """A process of its own, here with a file that is no library."""
    trial = nothing(read_tiles("gfx942"))
    with WorkerTimer(b"no ELF") as timer, pytest.raises(ResourceError, match="cannot load"):
        timer.time(trial, [])
