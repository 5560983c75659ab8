"""Predictions: roofs of the published model, and the check against this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sinterlm import cli
from sinterlm.artifact.bundle import Bundle
from sinterlm.bench.predict import DEVICES_BY_NAME, SHARES, predict, serving_roof_s
from sinterlm.bench.results import Peaks
from sinterlm.errors import UsageError
from sinterlm.runtime.roofline import Step, batch_loads, roof_seconds
from tests.bench.conftest import TINY


def predicted(capsys: pytest.CaptureFixture[str], *words: str) -> dict:  # type: ignore[type-arg]
    assert cli.main(["bench", "predict", *words, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_qwq_32b(capsys: pytest.CaptureFixture[str]) -> None:
    """A decode step streams 63.97 GB: 82.9 tokens/s on MI300X, 75.0 on H200, a context aside."""
    for device, roof, shares in (
        ("mi300x", 82.9, {"mi300x_stock_vllm_0.7.3": 0.579, "mi300x_paiton_vllm_0.7.3": 0.628}),
        ("h200", 75.0, {"h200_stock_vllm_0.8.0": 0.662}),
    ):
        facts = predicted(
            capsys, "qwq-32b", "--device", device, "--batch", "1,64", "--context", "2"
        )
        assert facts["kind"] == "prediction"
        first = facts["predictions"][0]
        assert 1 / first["roof_s"] == pytest.approx(roof, rel=0.005)
        assert first["bound"] == "memory"
        low, typical, high = first["expected_s"]
        assert first["roof_s"] < low < typical < high
        assert first["error"] is None
        assert facts["launches"] == 5 * 64 + 3
        gaps = [s - first["roof_s"] for s in first["with_launches_s"]]
        assert gaps == pytest.approx([323 * 1.3e-6, 323 * 2.1e-6])
        found = {p["system"]: p["share"] for p in facts["published"] if p["batch_size"] == 1}
        assert found == pytest.approx(shares, abs=0.005)


def test_weights_in_codes(capsys: pytest.CaptureFixture[str]) -> None:
    """4.5 bits of each weight of a layer, 8 of the head's: 18.3 GB; nothing published beside it."""
    words = ["qwq-32b", "--device", "mi300x", "--batch", "1", "--context", "2"]
    facts = predicted(capsys, *words, "--quantization", "int4")
    layers, head = 64 * (7168 + 5120 + 3 * 27648) * 5120, 152064 * 5120
    gbytes = (layers * 4.5 / 8 + head) / 1e9
    assert facts["predictions"][0]["gbytes"] == pytest.approx(gbytes, rel=0.002)
    assert (facts["quantization"], facts["launches"], facts["published"]) == (
        "int4 w4g32", 323, [],
    )  # fmt: skip
    assert cli.main(["bench", "predict", *words, "--quantization", "int4"]) == 0
    told = capsys.readouterr().out
    assert "which are of bf16" in told and "our table has 323" in told
    assert cli.main(["bench", "predict", "qwq-32b", "--quantization", "int4"]) == 2
    assert "--quantization goes with --device" in capsys.readouterr().err


def test_a_shape_without_gpu_kernels_has_no_launches(capsys: pytest.CaptureFixture[str]) -> None:
    facts = predicted(capsys, "qwq-32b", "--device", "h200", "--dtype", "fp32", "--batch", "1")
    assert facts["launches"] is None
    assert facts["predictions"][0]["with_launches_s"] is None


def test_this_machine_is_checked(
    tiny: Bundle, high_roof: list[tuple[float, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    facts = predicted(capsys, str(TINY), "--batch", "1,3", "--context", "20", "--rounds", "1")
    for one in facts["predictions"]:
        assert one["measured_s"] > 0
        assert one["error"] == pytest.approx(one["measured_s"] / one["expected_s"][1] - 1)
    assert cli.main(["bench", "predict", str(TINY), "--batch", "1", "--rounds", "1"]) == 0
    told = capsys.readouterr().out
    assert "PREDICTION" in told
    assert "error" in told


def test_bounds(tiny: Bundle) -> None:
    ops, windows = tiny.manifest.ops, tiny.manifest.constants.windows
    fast_memory = predict(ops, windows, Peaks(1e15, 1e9), SHARES["cpu"], [4], 16)[0]
    assert fast_memory.bound == "compute"
    checked = predict(ops, windows, Peaks(1e9, 1e15), SHARES["cpu"], [4], 16, {4: 1.0})[0]
    assert checked.bound == "memory"
    assert checked.is_inside is False
    pair = (1e9, 1e12)
    total = serving_roof_s(ops, windows, Peaks(*pair), 2, (8, 3))
    steps = [[Step(8, 8)] * 2, [Step(1, 9)] * 2, [Step(1, 10)] * 2]
    assert total == pytest.approx(
        sum(roof_seconds(batch_loads(ops, windows, step), *pair) for step in steps)
    )


def test_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has figures for"):
        DEVICES_BY_NAME["h200"].peaks("fp8")
    assert cli.main(["bench", "predict", "no-such", "--device", "h200"]) == 2
    assert cli.main(["bench", "predict", str(TINY), "--context", "1"]) == 2
    assert "--context 1" in capsys.readouterr().err
