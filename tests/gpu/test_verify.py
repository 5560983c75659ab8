"""scripts/verify_gpu.py, on a driver of no device: what an engineer with a device will run."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tarfile
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sinterlm.backends.gpu import objects
from sinterlm.backends.gpu.devices import DEVICES
from sinterlm.backends.gpu.library import archive_of
from sinterlm.compile import compile_model
from sinterlm.options import CompileOptions
from sinterlm.tune import session
from tests.conftest import ROOT
from tests.gpu.host import Machine, build_driver
from tests.gpu.models import tiny
from tests.gpu.recording import Launched, RecordingDriver
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


# -- logits of whole models ------------------------------------------------------------------------


@pytest.fixture
def logits(verify: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """gpu_logits with few tokens: prompts and answers for kernels of at most 16 rows."""
    module = import_module("gpu_logits")
    for name, value in {"PIECES": (12, 16), "ANSWER": 4, "PAGE": 16}.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_logits_of_a_trained_model(
    verify: ModuleType, logits: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Eagerly and by graphs, with a driver of no device; then with a kernel that is wrong."""
    args = SimpleNamespace(target="gfx942", output=tmp_path, check="reference:small")
    facts = verify.check_reference(args)
    assert facts["tokens"] == 12 + 16 + 2 * 3 and 0 < float(facts["KL(fp32||CPU bf16)"]) < 1e-4
    bundle = compile_model(CompileOptions(str(verify.TRAINED), target="gfx942", max_model_len=320))
    table, made = objects.read_archive(archive_of(bundle.library_path.read_bytes()))
    driver = RecordingDriver(DEVICES["gfx942"], table, [(o.kernel, o.code) for o in made])
    path = build_driver(tmp_path, "hip")
    driver.attach(path)
    monkeypatch.setenv("SINTERLM_GPU_DRIVER", str(path))
    for way, replayed in (("eager", 0), ("graphs", 5)):
        args.check = f"logits:small:{way}"
        facts = verify.check_logits(args)
        assert facts["graph_launches"] == replayed
        assert float(facts["KL(CPU bf16||device), answers"]) < 1e-5
        assert facts["answers that part, by the margin"] == []
    assert driver.faults == []

    def wrong(launched: Launched) -> None:
        """A quarter of what down_residual reads is zero."""
        driver.interpret(launched)
        if launched.kernel.name == "norm_gate_up_act":
            h = driver.bytes_from(driver.bound["buffer:h"]).view("u2")
            h[: 16 * 768].reshape(-1, 64)[::4] = 0

    driver.run = wrong
    args.check = "logits:small:eager"
    with pytest.raises(AssertionError, match="KL of prompts is beyond"):
        verify.check_logits(args)


def test_the_hours_plan(
    verify: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Every check has a name that ``--check`` takes; a small model, then a large one, each by
    launches and by graphs."""
    (tmp_path / "library").write_bytes(b"")
    table = tiny("llama-tied", "gfx942").table
    monkeypatch.setattr(verify, "bundle_of",
                        lambda *_: SimpleNamespace(library_path=tmp_path / "library"))  # fmt: skip
    monkeypatch.setattr(verify, "archive_of", bytes)
    monkeypatch.setattr(verify, "read_archive", lambda _: (table, []))
    args = SimpleNamespace(target="gfx942", config="qwq-32b", model="smollm2", stop_after_op=0)
    checks = [check for check, _ in verify.plan(args)]
    assert {check.split(":")[0] for check in checks} <= set(verify.CHECKS)
    at = checks.index("model")
    assert checks[at + 1 : at + 7] == [
        "reference:small", "logits:small:eager", "logits:small:graphs",
        "reference:large", "logits:large:eager", "logits:large:graphs",
    ]  # fmt: skip


# -- the rest of the hour --------------------------------------------------------------------------


def test_tiles_are_tuned_within_the_limit(
    verify: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    scripted = ScriptedTimer(lambda kernel, tokens: 100.0 / kernel.options["num_warps"])
    monkeypatch.setattr(session.tune, "__defaults__", (lambda *_: scripted,))
    monkeypatch.setattr(objects, "compile_each", lambda kernels, *_: no_code(kernels))
    args = SimpleNamespace(target="gfx942", config="qwq-32b", output=tmp_path, limit=60)
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
    names = ("load", "model", "logits:small:eager", "reference:small", "logits:small:eager")
    monkeypatch.setattr(verify, "plan", lambda _: iter([(name, 300.0) for name in names]))
    monkeypatch.setattr(sys, "argv", ["verify_gpu", "--target", "gfx942", "--output",
                                      str(tmp_path / "out")])  # fmt: skip
    assert verify.main() == 1
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert [r["state"] for r in results] == ["failed"] * 3 + ["passed", "failed"]
    assert all("libnone.so" in results[i]["why"] for i in (0, 1, 4))
    assert "small.npz" in results[2]["why"], "there was no reference yet"
    assert results[3]["facts"]["model"] == "tiny-llama"
    assert float(results[3]["facts"]["KL(fp32||CPU bf16)"]) < 1e-4
    assert (tmp_path / "out/clocks.log").read_text().count("after") == 6
    with tarfile.open(tmp_path / "out.tar.gz") as archive:
        assert {"out/report.md", "out/results.json", "out/clocks.log"} <= set(archive.getnames())
        assert not any("npz" in name for name in archive.getnames())


def test_help() -> None:
    told = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True,
                          check=True).stdout  # fmt: skip
    assert "--stop-after-op" in told
