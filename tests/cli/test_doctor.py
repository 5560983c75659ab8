"""``sinterlm doctor``: says what works, says how to mend what does not, exits 1 if nothing can."""

from __future__ import annotations

import json
import subprocess
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


DRIVER = """
#include <cstddef>
#include <cstring>
extern "C" int cuInit(unsigned) { return INIT; }
extern "C" int cuDeviceGetCount(int* n) { *n = COUNT; return 0; }
extern "C" int cuDeviceGetName(char* to, int, int) { strcpy(to, "fake H200"); return 0; }
extern "C" int cuDeviceTotalMem_v2(size_t* to, int) { *to = 150000000000u; return 0; }
extern "C" int cuDeviceGetAttribute(int* to, int which, int) { *to = which == 75 ? MAJOR : 0;
  return 0; }
"""
HIP = {"cuInit": "hipInit", "cuDeviceGetCount": "hipGetDeviceCount",
       "cuDeviceGetName": "hipDeviceGetName", "cuDeviceTotalMem_v2": "hipDeviceTotalMem",
       "cuDeviceGetAttribute(int* to, int which, int) { *to = which == 75 ? MAJOR : 0;":
       "hipDeviceComputeCapability(int* a, int* b, int) { *a = MAJOR; *b = 4;"}  # fmt: skip


@pytest.mark.parametrize(
    ("vendor", "init", "count", "major", "said"),
    [
        ("cuda", 0, 1, 9, "sees fake H200, 150 GB, --target sm_90; used with"),
        ("hip", 0, 2, 9, "GB, --target gfx942; fake H200, 150 GB, --target gfx942; used with"),
        ("cuda", 0, 1, 8, "no --target is for 8.0"),
        ("cuda", 0, 0, 9, "sees no device"),
        ("cuda", 100, 1, 9, "cannot be asked for devices (cuInit: CUDA error 100)"),
    ],
)
def test_what_drivers_see(
    vendor: str, init: int, count: int, major: int, said: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    text = DRIVER
    for cuda, hip in HIP.items() if vendor == "hip" else ():
        text = text.replace(cuda, hip)
    source, library = tmp_path / "driver.cpp", tmp_path / "libdriver.so"
    source.write_text(text)
    values = [f"-DINIT={init}", f"-DCOUNT={count}", f"-DMAJOR={major}"]
    subprocess.run(["g++", "-shared", "-fPIC", *values, source, "-o", library], check=True)
    monkeypatch.setenv("SINTERLM_GPU_DRIVER", str(library))
    check = doctor.check_gpu()
    assert said in check.finding and check.status == "info"
    assert len(check.data["devices"]) == (0 if init else count)


def test_a_driver_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SINTERLM_GPU_DRIVER", str(tmp_path / "libnone.so"))
    assert "libnone.so, which cannot be opened" in doctor.check_gpu().finding
