"""What is left to vLLM, and why; what is compiled for the rest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sinterlm.plugin.support import Accelerator, compile_options, refusal


def config(**changes: Any) -> SimpleNamespace:
    """A VllmConfig as far as it is read; ``model__dtype=...`` changes a field of a part."""
    made = SimpleNamespace(
        device_config=SimpleNamespace(device_type="cpu"),
        model_config=SimpleNamespace(
            model="org/m", revision=None, dtype="torch.bfloat16", runner_type="generate",
            quantization=None, hf_overrides={}, enable_prompt_embeds=False, max_model_len=512,
        ),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, tensor_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_seqs=256),
        compilation_config=SimpleNamespace(mode=SimpleNamespace(name="VLLM_COMPILE")),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        load_config=SimpleNamespace(load_format="auto"),
        lora_config=None,
        kv_transfer_config=None,
        speculative_config=None,
    )  # fmt: skip
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            setattr(getattr(made, f"{part}_config"), field, value)
        else:
            setattr(made, name, value)
    return made


def test_a_plain_model_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SINTERLM_QUANTIZATION", "int8")
    assert refusal(config()) is None
    options = compile_options(config(load__load_format="dummy"), 0)
    assert (options.model, options.dtype, options.max_model_len) == ("org/m", "bf16", 512)
    assert (options.quantization, options.load_format) == ("int8", "dummy")
    assert (options.tensor_parallel_size, options.tensor_parallel_rank) == (1, 0)
    assert refusal(config(speculative_config=SimpleNamespace(method="ngram"))) is None


def test_a_rank_compiles_its_part() -> None:
    ranks = config(parallel__tensor_parallel_size=4)
    assert refusal(ranks) is None
    options = compile_options(ranks, 3)
    assert (options.tensor_parallel_size, options.tensor_parallel_rank) == (4, 3)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"device__device_type": "cuda"}, "device cuda"),
        ({"model__dtype": "torch.float16"}, "float16"),
        ({"model__runner_type": "pooling"}, "pooling"),
        ({"model__quantization": "awq"}, "awq"),
        ({"model__hf_overrides": {"rope": 1}}, "hf_overrides"),
        ({"model__enable_prompt_embeds": True}, "embeddings"),
        ({"lora_config": object()}, "LoRA"),
        ({"parallel__pipeline_parallel_size": 2}, "pipeline"),
        ({"parallel__decode_context_parallel_size": 2}, "decode_context_parallel_size 2"),
        ({"parallel__enable_batch_sharded_sampling": True}, "batch-sharded"),
        ({"cache__cache_dtype": "fp8"}, "fp8"),
        ({"model__dtype": "torch.float32", "cache__cache_dtype": "bfloat16"}, "bfloat16 beside"),
        ({"kv_transfer_config": object()}, "KV transfer"),
        ({"speculative_config": SimpleNamespace(method="eagle")}, "eagle"),
    ],
)
def test_what_is_left_to_vllm(change: dict[str, Any], told: str) -> None:
    assert told in (refusal(config(**change)) or "")


MI300X = Accelerator("gfx942", "AMD Instinct MI300X", 0)


def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = config(device__device_type="cuda")
    assert refusal(cuda, MI300X) is None
    assert compile_options(cuda, 0, MI300X).target == "gfx942"
    assert refusal(cuda, Accelerator("sm_90", "NVIDIA H100", 0)) is None
    assert compile_options(config(), 0).target == "cpu"
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    assert "VLLM_USE_BREAKABLE_CUDAGRAPH" in (refusal(cuda, MI300X) or "")


@pytest.mark.parametrize(
    ("accelerator", "change", "told"),
    [
        (Accelerator("gfx90a", "AMD Instinct MI250X", 0), {}, "no kernels for gfx90a (AMD Inst"),
        (Accelerator("sm_80", "NVIDIA A100", 0), {}, "sm_80"),
        (Accelerator("sm_90", "NVIDIA H100", 1), {}, "device 1 of this process"),
        (MI300X, {"model__dtype": "torch.float32"}, "float32 is not supported on a GPU"),
        (MI300X, {"parallel__tensor_parallel_size": 2}, "size 2 is not supported on a GPU"),
        (MI300X, {"scheduler__max_num_seqs": 1024}, "give --max-num-seqs 256"),
        (MI300X, {"parallel__enable_dbo": True}, "microbatches"),
        (MI300X, {"compilation__mode": SimpleNamespace(name="STOCK_TORCH_COMPILE")}, "STOCK"),
        (MI300X, {"lora_config": object()}, "LoRA"),
        (MI300X, {"cache__cache_dtype": "fp8"}, "fp8"),
    ],
)
def test_what_is_left_to_vllm_on_a_gpu(
    accelerator: Accelerator, change: dict[str, Any], told: str
) -> None:
    assert told in (refusal(config(device__device_type="cuda", **change), accelerator) or "")
