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
        found = {p["system"]: p["share"] for p in facts["published"] if p["batch_size"] == 1}
        assert found == pytest.approx(shares, abs=0.005)


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
