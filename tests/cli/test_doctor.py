"""``sinterlm doctor``: says what works, says how to mend what does not, exits 1 if nothing can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sinterlm import cli
from sinterlm.commands import doctor

NAMES = [
    "python", "isa", "compiler", "threads", "memory", "huge pages", "cache", "demo model", "gpu",
    "vendor gemm", "self-test",
]  # fmt: skip


def test_a_machine_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert report["can_run"] is True
    assert [check["name"] for check in report["checks"]] == NAMES
    measured = report["checks"][-1]["data"]
    assert measured["gbytes_per_s"] > 0.1
    assert measured["gflops"] > 0.1


def test_a_machine_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SINTERLM_CXX", str(tmp_path / "no-such-compiler"))
    assert cli.main(["doctor", "--cache-dir", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "WARN  compiler" in out
    assert "FAIL  self-test" in out
    assert "SINTERLM_CXX" in out
    assert "Nothing can run here yet" in out


def test_a_check_that_fails_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: object) -> doctor.Check:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(doctor, "check_self_test", broken)
    assert cli.main(["doctor", "--json"]) == 1
    last = json.loads(capsys.readouterr().out)["checks"][-1]
    assert (last["status"], last["name"]) == ("fail", "self test")


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    check = doctor.check_cache(tmp_path / "cache")
    assert check.status == "warn"
    assert "SINTERLM_CACHE_DIR" in check.advice
