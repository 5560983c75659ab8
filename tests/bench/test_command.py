"""``sinterlm bench``: JSON with its fields, tables, and flags that are refused."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sinterlm import cli
from sinterlm.artifact.bundle import Bundle
from sinterlm.bench.startup import first_token_seconds
from sinterlm.commands import bench
from sinterlm.commands.bench import local, startup
from sinterlm.errors import RuntimeFault
from sinterlm.options import CompileOptions
from tests.bench.conftest import TINY

THROUGHPUT = ("bench", "throughput", str(TINY), "--input-len", "8", "--output-len", "3",
              "--rounds", "1")  # fmt: skip
KERNELS = ("bench", "kernels", str(TINY), "--batch-sizes", "1,3", "--context", "20", "--prefill",
           "16", "--steps", "2", "--rounds", "1")  # fmt: skip


def bench_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.main([*words, "--json"]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def test_throughput_as_json(
    tiny: Bundle, high_roof: list[tuple[float, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    facts = bench_json(capsys, *THROUGHPUT, "--batch-sizes", "1,3", "--num-threads", "1")
    assert facts["benchmark"] == "throughput"
    assert {"cpu", "num_cpus", "cpu_quota", "memory_bytes", "versions"} <= set(facts["machine"])
    assert set(facts["machine"]["versions"]) == {"sinterlm", "python", "numpy"}
    assert facts["model"]["isa"] == tiny.manifest.isa
    assert facts["model"]["num_threads"] == 1
    assert len(facts["probes"]) == 3
    assert [case["num_prompts"] for case in facts["cases"]] == [1, 3]
    assert all(0 < case["fraction"] < 1 for case in facts["cases"])


def test_more_prompts_than_seats_queue(
    tiny: Bundle, high_roof: list[tuple[float, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    facts = bench_json(capsys, *THROUGHPUT, "--num-prompts", "5", "--max-num-seqs", "2")
    assert facts["cases"][0]["num_steps"] == [9]  # three turns of three steps


def test_kernels_as_json(
    tiny: Bundle, high_roof: list[tuple[float, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    facts = bench_json(capsys, *KERNELS)
    assert [(c["kind"], c["num_tokens"]) for c in facts["cases"]] == [
        ("decode", 1), ("decode", 3), ("prefill", 16),
    ]  # fmt: skip
    for case in facts["cases"]:
        assert sum(part["seconds"] for part in case["budget"]) == pytest.approx(case["step_s"])
        assert {"calls", "seconds", "nbytes", "flops", "bytes_per_s", "flops_per_s", "roof_s",
                "fraction", "bound"} <= set(case["ops"][0])  # fmt: skip


def test_tables(
    tiny: Bundle, high_roof: list[tuple[float, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*THROUGHPUT, "--batch-sizes", "3"]) == 0
    assert cli.main([*KERNELS]) == 0
    out = capsys.readouterr().out
    for word in ("total tok/s", "of the roof", "norm_lm_head_sample", "python: schedule",
                 "prefill of 16 tokens", "GFLOP/s (2 probes)"):  # fmt: skip
        assert word in out, word


def test_a_fraction_beyond_belief_is_not_printed(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sinterlm.bench.recording.RecordingModel.probe", lambda *_: (1e-3, 1e-3))
    assert cli.main([*THROUGHPUT, "--batch-sizes", "1"]) == 0
    told = capsys.readouterr()
    assert "no fraction" in told.out
    assert "%" not in told.out
    assert "faster than the roof" in told.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("bench",), "required"),
        (("bench", "kernel", "m"), "did you mean 'kernels'?"),
        (("bench", "throughput", "m", "--batch-sizes", "1,x"), "'x' is not a whole number"),
        (("bench", "throughput", "m", "--batch-sizes", "2,2"), "twice"),
        (("bench", "throughput", "m", "--batch-sizes", "5000"), "more than 4096"),
        (("bench", "throughput", "m", "--rounds", "0"), "1 or more"),
        (("bench", "throughput", "m", "--num-prompts", "4", "--batch-sizes", "4"), "not allowed"),
        (("bench", "kernels", "m", "--contxt", "4"), "did you mean --context?"),
        (("bench", "startup", "m", "--rounds", "x"), "1 or more"),
    ],
)
def test_bad_words(words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    assert left.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((*THROUGHPUT, "--code-only"), "--code-only"),
        ((*THROUGHPUT, "--batch-sizes", "8", "--max-num-seqs", "4"), "--max-num-seqs 4"),
        ((*THROUGHPUT, "--max-model-len", "10"), "--max-model-len 10 is less than the 11"),
        ((*KERNELS, "--max-num-batched-tokens", "15"), "--max-num-batched-tokens 15"),
        (("bench", "throughput", "no-such-model"), "no-such-model"),
        (("bench", "startup", "no-such-model", "--rounds", "1"), "no-such-model"),
    ],
)
def test_refused(words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert told in capsys.readouterr().err


def test_names_of_shapes_run_with_random_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert local.with_dummy_weights(CompileOptions("qwen2.5-0.5b")).load_format == "dummy"
    assert local.with_dummy_weights(CompileOptions("smollm2")).load_format == "auto"
    (tmp_path / "qwen2.5-0.5b").mkdir()
    assert local.with_dummy_weights(CompileOptions("qwen2.5-0.5b")).load_format == "auto"


def test_startup(tiny: Bundle, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    facts = bench_json(
        capsys, "bench", "startup", str(TINY), "--rounds", "1", "--cache-dir", str(tmp_path)
    )
    assert 0 < facts["median_warm_s"] < facts["median_cold_s"]
    assert facts["cold_s"] == [facts["median_cold_s"]]
    assert not list(tmp_path.iterdir())  # the caches it made are gone


def test_startup_takes_the_first_byte(tmp_path: Path) -> None:
    answers_then_sleeps = (
        "import sys, time; sys.stdout.write('a'); sys.stdout.flush(); time.sleep(3)"
    )
    assert first_token_seconds([sys.executable, "-c", answers_then_sleeps], str(tmp_path)) < 3
    with pytest.raises(RuntimeFault, match="ended with 3"):
        first_token_seconds([sys.executable, "-c", "raise SystemExit(3)"], str(tmp_path))


def test_startup_hands_its_flags_on() -> None:
    given = ["--cpu-ids", "0,2", "--dtype", "fp32", "--load-format", "dummy", "--seed", "3"]
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    args = parser.parse_args(["startup", "m", "--cache-dir", "c", *given])
    assert startup.run_words(args) == ["m", *given]
