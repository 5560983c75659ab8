"""``sinterlm inspect``: a checkpoint and its bundle tell the same costs, and they add up."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sinterlm import cli
from sinterlm.commands import probe


def inspect(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.main(["inspect", *words, "--json"]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def test_checkpoint_is_planned_without_compiling(capsys: pytest.CaptureFixture[str]) -> None:
    facts = inspect(capsys, "smollm2")
    assert facts["shape"]["num_layers"] == 30
    kinds = {op["name"] for op in facts["ops"]}
    assert {"attention", "norm_qkv_rope_kv", "norm_lm_head_sample"} <= kinds
    assert facts["total"]["bytes"] == sum(op["bytes"] for op in facts["ops"])
    assert facts["total"]["flops"] == sum(op["flops"] for op in facts["ops"])
    ends = [t["offset"] + t["bytes"] for t in facts["packing"]]
    assert max(ends) == facts["memory"]["weights_bytes"]
    assert facts["memory"]["kv_bytes_per_token"] == 2 * 30 * 3 * 64 * 2
    assert len(facts["graph"]) == len(facts["ops"])
    assert "machine" not in facts


def test_a_kv_cache_in_codes(capsys: pytest.CaptureFixture[str]) -> None:
    facts = inspect(capsys, "smollm2", "--kv-cache-dtype", "int8")
    assert facts["kv_cache_dtype"] == "int8"
    assert facts["memory"]["kv_bytes_per_token"] == 2 * 30 * 3 * (64 + 4)
    assert cli.main(["inspect", "smollm2", "--kv-cache-dtype", "int8"]) == 0
    assert "LlamaForCausalLM, bf16, KV cache int8," in capsys.readouterr().out


def test_bundle_costs_what_its_checkpoint_does(
    compiled: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from_checkpoint = inspect(capsys, "smollm2", "--context", "100")
    from_bundle = inspect(capsys, compiled["bundle"], "--context", "100")
    for key in ("ops", "total", "memory", "shape", "dtype"):
        assert from_bundle[key] == from_checkpoint[key]
    assert from_bundle["bundle"]["sha256"] == compiled["bundle_sha256"]


def test_known_shapes_need_no_weights(capsys: pytest.CaptureFixture[str]) -> None:
    facts = inspect(capsys, "qwq-32b", "--load-format", "dummy", "--tokens", "512")
    assert facts["memory"]["weights_bytes"] > 60e9
    assert facts["step"] == {"num_tokens": 512, "context_len": 1024, "num_rows": 1}


def test_roofline_from_given_slopes(capsys: pytest.CaptureFixture[str]) -> None:
    slopes = ("--bandwidth-gbps", "10", "--gflops", "100")
    decode = inspect(capsys, "smollm2", *slopes)
    prefill = inspect(capsys, "smollm2", "--tokens", "512", *slopes)
    for facts in (decode, prefill):
        for op in facts["ops"]:
            assert op["roof_s"] == pytest.approx(max(op["bytes"] / 10e9, op["flops"] / 100e9))
        assert facts["total"]["roof_s"] == pytest.approx(sum(o["roof_s"] for o in facts["ops"]))
    bound = {op["name"]: op["bound"] for op in decode["ops"]}
    assert bound["norm_gate_up_act"] == "memory"
    bound = {op["name"]: op["bound"] for op in prefill["ops"]}
    assert bound["norm_gate_up_act"] == "compute"


def test_tables_name_every_kind_of_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "smollm2", "--bandwidth-gbps", "10", "--gflops", "100"]) == 0
    out = capsys.readouterr().out
    for word in ("norm_gate_up_act", "0-29", "Packing", "Activations", "layers.0.qkv", "tokens/s"):
        assert word in out
    assert "layers.17." not in out
    assert cli.main(["inspect", "smollm2", "--all-layers"]) == 0
    assert "layers.17.qkv" in capsys.readouterr().out


def test_probe_gives_the_slopes(
    compiled: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probe, "measure", lambda _: (200.0, 20.0))  # `doctor` measures for real
    facts = inspect(capsys, compiled["bundle"], "--probe")
    assert facts["machine"] == {"bytes_per_s": 20e9, "flops_per_s": 200e9}
