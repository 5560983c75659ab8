"""scripts/verify_gpu.py, on a driver of no device: what an engineer with a device will run."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sinterlm.backends.gpu import objects
from sinterlm.tune import session
from tests.conftest import ROOT
from tests.gpu.host import Machine
from tests.gpu.recording import Launched
from tests.gpu.tuned import ScriptedTimer, no_code

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("triton")]

SCRIPT = ROOT / "scripts/verify_gpu.py"


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("verify_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "verify_gpu", module)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec.loader.exec_module(module)
    monkeypatch.setitem(
        import_module("gpu_device").SIZES, "max_tokens", 16
    )  # machine's kernels are for few rows
    return module


@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_each_launch_alone(machine: Machine, verify: ModuleType, step: str) -> None:
    device = verify.Device(machine.bundle())
    for launch in range(len(machine.table.launches)):
        errors = device.run_one(launch, step)
        assert set(errors) >= {"buffer:x", "buffer:logits", "k:0"}
        assert not any(errors.values()), "the same interpreter on both sides"
    device.model.close()
    assert machine.driver.faults == []


@pytest.mark.parametrize("launch", [0, 3, 6])
def test_a_wrong_kernel_is_seen(machine: Machine, verify: ModuleType, launch: int) -> None:
    def wrong(launched: Launched) -> None:
        """One number of the residual stream has another sign."""
        machine.driver.interpret(launched)
        if where := machine.driver.bound.get("buffer:x"):
            machine.driver.bytes_from(where).view("u2")[1] ^= 0x8000

    machine.driver.run = wrong
    device = verify.Device(machine.bundle())
    machine.driver.position = launch  # which of the table's it has to expect
    with pytest.raises(AssertionError, match="is off by"):
        device.run_one(launch, "prefill")
    device.model.close()


def test_tiles_are_tuned_within_the_limit(
    verify: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    scripted = ScriptedTimer(lambda kernel, tokens: 100.0 / kernel.options["num_warps"])
    monkeypatch.setattr(session.tune, "__defaults__", (lambda *_: scripted,))
    monkeypatch.setattr(objects, "compile_each", lambda kernels, *_: no_code(kernels))
    args = SimpleNamespace(target="gfx942", model="qwq-32b", output=tmp_path, limit=60)
    facts = verify.check_tune(args)
    *others, gate_up, down = facts["found"]
    assert [row["kernel"] for row in others] == ["attention decode <= 16", "attention prompts"]
    for row, name in ((gate_up, "norm_gate_up_act <= 16"), (down, "down_residual <= 16")):
        assert row["kernel"] == name
        assert row["best us"]["16"] == 12.5 < row["start us"]["16"] == 25
    assert {path.name for path in tmp_path.iterdir()} == {"tiles-gfx942.json",
                                                          "tiles-gfx942.json.journal"}  # fmt: skip


def test_errors_have_bounds(verify: ModuleType) -> None:
    want = np.array([1.0, -2.0, 100.0, np.nan], np.float32)
    share = import_module("gpu_device").error_share
    assert share(want, want, "*fp32") == 0
    assert share(want + np.float32(0.1), want, "*fp32") <= 1
    assert share(want + np.float32(0.3), want, "*fp32") > 1
    assert share(np.zeros(4, np.float32), want, "*fp32") == np.inf, "NaN became a number"
    assert share(np.array([1, 2], np.int32), np.array([1, 3], np.int32), "*i32") == np.inf


def test_without_a_driver_each_check_fails_and_all_is_told(tmp_path: Path, verify: ModuleType,
                                                           monkeypatch: Any) -> None:  # fmt: skip
    monkeypatch.setenv("SINTERLM_GPU_DRIVER", str(tmp_path / "libnone.so"))
    monkeypatch.setattr(verify, "plan", lambda _: iter([("load", 300.0), ("model", 300.0)]))
    monkeypatch.setattr(sys, "argv", ["verify_gpu", "--target", "gfx942", "--output",
                                      str(tmp_path / "out")])  # fmt: skip
    assert verify.main() == 1
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert [r["state"] for r in results] == ["failed", "failed"]
    assert all("libnone.so" in r["why"] for r in results)
    assert (tmp_path / "out/clocks.log").read_text().count("after") == 3
    assert (tmp_path / "out.tar.gz").is_file()


def test_help() -> None:
    told = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True,
                          check=True).stdout  # fmt: skip
    assert "--stop-after-op" in told
