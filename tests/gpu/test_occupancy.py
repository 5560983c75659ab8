"""The occupancy that objects are meant to have, and what is recorded of it in docs/gpu.md."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sinterlm.artifact.memo import Memo
from sinterlm.backends.gpu import objects
from sinterlm.backends.gpu.devices import DEVICES, Device
from sinterlm.backends.gpu.occupancy import below_step, programs_of
from sinterlm.cli import main
from sinterlm.errors import CompileError
from tests.conftest import ROOT
from tests.gpu.models import tiny

GOOD = {"registers": 64, "shared_bytes": 1024, "occupancy": 2}


def test_the_occupancy_that_is_intended() -> None:
    """On AMD two waves per SIMD; on NVIDIA a program per SM, two of four warps: by registers, which
    a warp gets in pieces of 8 per thread, and by shared memory. What a device measured may be less.
    """
    kernels = tiny("llama-tied", "gfx942").table.kernels
    kernel = next(k for k in kernels if k.options["waves_per_eu"] == 0)
    amd, nvidia = DEVICES["gfx942"], DEVICES["sm_90"]

    def told(device: Device, warps: int, source: str = "", **facts: Any) -> list[str]:
        options = {**kernel.options, "num_warps": warps}
        one = replace(kernel, options=options, source=source)
        return below_step(objects.Object(one, b"", {**GOOD, **facts}), device)

    assert not told(amd, 4, occupancy=2)
    assert told(amd, 4, occupancy=1) == ["1 waves per SIMD, of 2 that are intended"]
    assert told(amd, 4, occupancy=None) != [], "the compiler did not tell"
    assert not told(amd, 4, "measured on MI300X", occupancy=1)

    assert not told(nvidia, 4, registers=255) and not told(nvidia, 8, registers=255)
    assert not told(nvidia, 16, registers=128)
    assert told(nvidia, 16, registers=129)[0].startswith("0 programs of 16 warps per SM, of 1")
    assert not told(nvidia, 4, shared_bytes=113 << 10)
    (found,) = told(nvidia, 4, shared_bytes=(113 << 10) + 1)
    assert found.startswith("1 programs of 4 warps per SM, of 2") and "115713 bytes" in found
    assert not told(nvidia, 8, shared_bytes=227 << 10)
    assert not told(nvidia, 4, "measured on H200", shared_bytes=227 << 10)


@pytest.mark.parametrize(
    ("device", "warps", "facts", "programs"),
    [
        ("gfx942", 4, {"occupancy": 4, "shared_bytes": 0}, 4),
        ("gfx942", 4, {"occupancy": 3, "shared_bytes": 40 << 10}, 1),
        ("gfx942", 8, {"occupancy": 3, "shared_bytes": 32 << 10}, 1),
        ("gfx942", 2, {"occupancy": 3, "shared_bytes": 20 << 10}, 3),
        ("gfx1201", 4, {"occupancy": 5, "shared_bytes": 32 << 10}, 4),
        ("sm_90", 4, {"registers": 188, "shared_bytes": 72 << 10}, 2),
        ("sm_90", 8, {"registers": 126, "shared_bytes": 96 << 10}, 2),
        ("sm_90", 4, {"registers": 16, "shared_bytes": 0}, 16),
        ("sm_100", 4, {"registers": 71, "shared_bytes": 60 << 10}, 3),
    ],
)
def test_programs_of_a_unit(device: str, warps: int, facts: dict, programs: int) -> None:
    kernel = tiny("llama-tied", device).table.kernels[0]
    kernel = replace(kernel, options={**kernel.options, "num_warps": warps})
    made = objects.Object(kernel, b"", {**GOOD, **facts})
    assert programs_of(made, DEVICES[device]) == programs


def test_an_object_below_the_intended_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = next(k for k in tiny("llama-tied", "sm_90").table.kernels if k.name == "lm_head")
    made = objects.Object(kernel, b"", {**GOOD, "shared_bytes": 120 << 10})
    monkeypatch.setattr(objects, "compile_each", lambda *_: [made])
    with pytest.raises(CompileError, match="1 programs of 4 warps per SM, of 2 that are intended"):
        objects.compile_objects([kernel], DEVICES["sm_90"], Memo(None))


def recorded(device: str) -> dict[tuple[str, str], tuple[int | None, int]]:
    """Waves per SIMD and programs per unit by launch and steps, of QwQ-32B in bf16: the first table
    of docs/gpu.md."""
    text = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
    head, *lines = text[text.index("| device | launch |") :].split("\n\n")[0].splitlines()
    columns = [cell.strip() for cell in head.strip("|").split("|")]
    found = {}
    for line in lines[1:]:
        row = dict(zip(columns, map(str.strip, line.strip("|").split("|")), strict=True))
        if row["device"] == device:
            waves = row["waves per SIMD"]
            found[row["launch"], row["steps"]] = (
                None if waves == "–" else int(waves), int(row["programs per unit"]),
            )  # fmt: skip
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("device", ["gfx942", "sm_90"])
def test_no_kernel_of_qwq_loses_a_step(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of every launch at least the waves and programs that the documented table has."""
    out = tmp_path / "out"
    given = ["qwq-32b", "--target", device, "--code-only"]
    assert main(["compile", *given, "-o", str(out), "--json"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(out), "--json"]) == 0
    found = {}
    for kernel in json.loads(capsys.readouterr().out)["launches"]["kernels"]:
        most = kernel["most"][0]
        steps = f"{kernel['unit']} ≤ {most}" if most else f"any {kernel['unit']}"
        made = kernel["object"]
        for slot in kernel["slots"]:
            name = "decode" if kernel["kind"] == "decode" else steps
            found[slot, name] = (made["occupancy"], made["programs_per_unit"])
    for key, (waves, programs) in recorded(device).items():
        assert found[key][1] >= programs, key
        assert waves is None or found[key][0] >= waves, key
