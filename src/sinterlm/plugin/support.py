"""Whether SinterLM runs what vLLM was told to run; the reason where it does not.

Looked at before any weight is loaded, so that vLLM's own class can still take over.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sinterlm.options import CompileOptions, DTypeName
from sinterlm.plugin.switch import read_quantization

#: torch's names of the dtypes that we compile.
_DTYPES: dict[str, DTypeName] = {"torch.bfloat16": "bf16", "torch.float32": "fp32"}


def refusal(config: Any) -> str | None:
    """Why ``config``, a VllmConfig, is left to vLLM; None where nothing speaks against us."""
    return next(_reasons(config), None)


def _reasons(config: Any) -> Iterator[str]:
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    if config.device_config.device_type != "cpu":
        yield f"device {config.device_config.device_type} is not supported yet"
    if str(model.dtype) not in _DTYPES:
        yield f"dtype {model.dtype} is not supported (bfloat16, float32)"
    if model.runner_type != "generate":
        yield f"runner {model.runner_type} is not supported"
    if model.quantization is not None:
        yield f"quantization {model.quantization} is vLLM's own"
    if model.hf_overrides:
        yield "hf_overrides change the model"
    if model.enable_prompt_embeds:
        yield "prompt embeddings are not supported"
    if config.lora_config is not None:
        yield "LoRA is not supported"
    if parallel.pipeline_parallel_size > 1:
        yield "pipeline parallelism is not supported"
    for name in ("prefill_context_parallel_size", "decode_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            yield f"{name} {getattr(parallel, name)} is not supported: ranks share heads out"
    if getattr(parallel, "enable_batch_sharded_sampling", False):
        yield "batch-sharded sampling is not supported: every rank has all logits"
    if cache.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
        yield f"a KV cache of {cache.cache_dtype} beside {model.dtype} is not supported"
    if config.kv_transfer_config is not None:
        yield "KV transfer is not supported: pages have a layout of our own"
    speculation = config.speculative_config
    if speculation is not None and speculation.method != "ngram":
        yield f"speculation by {speculation.method} is not supported (ngram is)"


def compile_options(config: Any, rank: int) -> CompileOptions:
    """What to compile for tensor-parallel rank ``rank`` of ``config``, which ``refusal`` let pass.
    Raises UsageError."""
    model = config.model_config
    is_dummy = config.load_config.load_format == "dummy"
    return CompileOptions(
        model=model.model,
        dtype=_DTYPES[str(model.dtype)],
        quantization=read_quantization(),
        load_format="dummy" if is_dummy else "auto",
        max_model_len=model.max_model_len,
        revision=model.revision,
        tensor_parallel_size=config.parallel_config.tensor_parallel_size,
        tensor_parallel_rank=rank,
    )
