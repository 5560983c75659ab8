"""config.json to DecoderConfig."""

from __future__ import annotations

from typing import Any

import pytest

from sinterlm.errors import CheckpointError, UnsupportedModelError
from sinterlm.frontend.fields import parse_json
from sinterlm.frontend.hf_config import read_config, with_tensors
from sinterlm.frontend.named_configs import named_configs
from tests.frontend.builders import tiny_config

REQUIRED = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "rms_norm_eps",
]  # fmt: skip


def qwen(kind: int, **changes: Any) -> dict[str, Any]:
    name = f"Qwen{kind}ForCausalLM"
    return tiny_config(architectures=[name], model_type=f"qwen{kind}", **changes)


def mistral(**changes: Any) -> dict[str, Any]:
    return tiny_config(architectures=["MistralForCausalLM"], model_type="mistral", **changes)


@pytest.mark.parametrize("key", REQUIRED)
@pytest.mark.parametrize("value", [None, "many", -1, True, [4], 1.5e300])
def test_required_keys_are_named(key: str, value: object) -> None:
    data = tiny_config()
    data[key] = value
    with pytest.raises(CheckpointError) as caught:
        read_config(data)
    assert key in str(caught.value)


def test_head_dim() -> None:
    assert read_config(tiny_config()).head_dim == 8
    assert read_config(tiny_config() | {"head_dim": None}).head_dim == 8
    assert read_config(tiny_config(head_dim=24)).head_dim == 24
    assert read_config(qwen(3)).head_dim == 128
    for bad in (7, 0, 4096):
        with pytest.raises(CheckpointError, match="head_dim"):
            read_config(tiny_config(head_dim=bad))
    with pytest.raises(CheckpointError, match="hidden_size 33"):
        read_config(tiny_config(hidden_size=33))


@pytest.mark.parametrize(("heads", "kv"), [(5, 1), (10, 2), (7, 7), (8, 4), (40, 8)])
def test_any_gqa_ratio(heads: int, kv: int) -> None:
    config = read_config(
        tiny_config(num_attention_heads=heads, num_key_value_heads=kv, hidden_size=8 * heads)
    )
    assert config.group_size == heads // kv


def test_kv_heads_default_and_mismatch() -> None:
    assert read_config(tiny_config(num_key_value_heads=None)).num_kv_heads == 4
    with pytest.raises(CheckpointError, match="num_key_value_heads 3"):
        read_config(tiny_config(num_key_value_heads=3))


def test_biases_follow_the_config() -> None:
    def flags(data: dict[str, Any]) -> tuple[bool, bool, bool]:
        config = read_config(data)
        return config.qkv_bias, config.o_bias, config.mlp_bias

    assert flags(tiny_config()) == (False, False, False)
    assert flags(tiny_config(attention_bias=True, mlp_bias=True)) == (True, True, True)
    assert flags(qwen(2)) == (True, False, False)
    assert flags(qwen(3, attention_bias=True)) == (True, True, False)
    assert flags(mistral()) == (False, False, False)


def test_biases_in_the_checkpoint_are_used() -> None:
    config = read_config(tiny_config())
    assert with_tensors(config, ["model.layers.1.self_attn.k_proj.bias"]).qkv_bias
    assert with_tensors(config, ["model.layers.0.self_attn.o_proj.bias"]).o_bias
    assert with_tensors(config, ["model.layers.0.mlp.up_proj.bias"]).mlp_bias
    assert with_tensors(config, ["lm_head.bias"]) == config


def test_architecture_from_model_type() -> None:
    data = tiny_config(architectures=None, model_type="qwen3")
    assert read_config(data).architecture == "Qwen3ForCausalLM"


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["GPT2LMHeadModel"]},
        {"architectures": ["LlamaForCausalLM"], "model_type": "gemma"},
        {"architectures": None, "model_type": "gpt2"},
        {"architectures": ["LlamaForCausalLM", "Qwen2ForCausalLM"]},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": [3]},
        {"architectures": []},
    ],
)
def test_other_architectures_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tiny_config(**changes))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "hqq"}}, "hqq"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"num_experts": 64}, "num_experts"),
        ({"logits_scaling": 8.0}, "logits_scaling"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"use_mrope": True}, "use_mrope"),
        ({"vision_config": {}}, "vision_config"),
    ],
)
def test_what_changes_the_mathematics_is_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(UnsupportedModelError, match=word) as caught:
        read_config(tiny_config(**changes))
    assert "supported" in str(caught.value)


def test_harmless_keys_are_not_refused() -> None:
    harmless = {
        "pretraining_tp": 2, "attention_dropout": 0.0, "use_cache": True, "dtype": "bfloat16",
        "torch_dtype": "float16", "transformers_version": "5.0.0", "partial_rotary_factor": 1.0,
        "num_experts": 0, "use_mrope": False, "initializer_range": 0.02,
    }  # fmt: skip
    assert read_config(tiny_config(**harmless)) == read_config(tiny_config())


def test_mistral_window() -> None:
    assert read_config(mistral(sliding_window=24)).sliding_windows == (24, 24)
    assert read_config(mistral() | {"sliding_window": None}).sliding_windows == ()
    assert read_config(mistral()).sliding_windows == (4096, 4096)  # transformers' default


def test_qwen_window() -> None:
    on = {"use_sliding_window": True, "sliding_window": 16}
    assert read_config(qwen(2, sliding_window=16)).sliding_windows == ()
    assert read_config(qwen(2, **on, max_window_layers=1)).sliding_windows == (0, 16)
    assert read_config(qwen(2, **on)).sliding_windows == ()  # starts at layer 28
    assert read_config(qwen(3, **on, max_window_layers=0) | {"sliding_window": None}) == (
        read_config(qwen(3))
    )
    kinds = ["sliding_attention", "full_attention"]
    assert read_config(qwen(2, **on, layer_types=kinds)).sliding_windows == (16, 0)
    with pytest.raises(UnsupportedModelError, match="linear_attention"):
        read_config(qwen(2, **on, layer_types=["linear_attention", "full_attention"]))
    with pytest.raises(CheckpointError, match="layer_types"):
        read_config(qwen(2, **on, layer_types=["full_attention"]))
    with pytest.raises(CheckpointError, match="use_sliding_window"):
        read_config(qwen(2, layer_types=kinds))


def test_llama_ignores_a_window() -> None:
    assert read_config(tiny_config(sliding_window=8)).sliding_windows == ()


@pytest.mark.parametrize(
    ("name", "shape", "billions"),
    [
        ("qwq-32b", (64, 5120, 40, 8, 128), 32.8),
        ("llama-3.1-8b", (32, 4096, 32, 8, 128), 8.03),
        ("qwen2.5-0.5b", (24, 896, 14, 2, 64), 0.494),
        ("qwen2.5-1.5b", (28, 1536, 12, 2, 128), 1.54),
        ("qwen2.5-7b", (28, 3584, 28, 4, 128), 7.62),
    ],
)
def test_named_configs(name: str, shape: tuple[int, ...], billions: float) -> None:
    from sinterlm.frontend.decoder import build_graph

    config = read_config(named_configs()[name])
    assert shape == (
        config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads,
        config.head_dim,
    )  # fmt: skip
    total = 0
    for weight in build_graph(config, "bf16").weights.values():
        count = 1
        for n in weight.shape:
            count *= n
        total += count
    assert total / 1e9 == pytest.approx(billions, rel=0.005)  # the published parameter counts


@pytest.mark.parametrize(
    "text",
    ['{"a": NaN}', '{"a": Infinity}', "[1]", "", "{", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"],
)
def test_bad_json(text: str) -> None:
    with pytest.raises(CheckpointError, match="the file"):
        parse_json(text, "the file")
