"""Whether SinterLM runs what vLLM was told to run; the reason where it does not.

Looked at before any weight is loaded, so that vLLM's own class can still take over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sinterlm.artifact.env import env_text
from sinterlm.backends.gpu.devices import DEVICES
from sinterlm.backends.gpu.launch import MAX_SEQS
from sinterlm.options import CompileOptions, DTypeName
from sinterlm.plugin.switch import read_quantization

#: torch's names of the dtypes that we compile.
_DTYPES: dict[str, DTypeName] = {"torch.bfloat16": "bf16", "torch.float32": "fp32"}


@dataclass(frozen=True)
class Accelerator:
    """The GPU of this process."""

    arch: str  #: "gfx942", "sm_90"
    name: str
    index: int  #: among the visible ones

    @property
    def target(self) -> str | None:
        """What to compile for; None where there are no kernels for it."""
        return self.arch if self.arch in DEVICES else None


def refusal(config: Any, accelerator: Accelerator | None = None) -> str | None:
    """Why ``config``, a VllmConfig, is left to vLLM; None where nothing speaks against us.
    ``accelerator`` is what its device "cuda" is, None on a CPU."""
    return next(_reasons(config, accelerator), None)


def _reasons(config: Any, accelerator: Accelerator | None) -> Iterator[str]:
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    if accelerator is not None:
        yield from _reasons_on_a_gpu(config, accelerator)
    elif config.device_config.device_type != "cpu":
        yield f"device {config.device_config.device_type} is not supported"
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


def _reasons_on_a_gpu(config: Any, accelerator: Accelerator) -> Iterator[str]:
    """What holds there in addition."""
    parallel, scheduler = config.parallel_config, config.scheduler_config
    if accelerator.target is None:
        yield (
            f"there are no kernels for {accelerator.arch} ({accelerator.name}), but for "
            f"{', '.join(DEVICES)}"
        )
    if accelerator.index != 0:
        yield (
            f"device {accelerator.index} of this process is not its first; give each process one "
            "with CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES"
        )
    if str(config.model_config.dtype) != "torch.bfloat16":
        yield f"dtype {config.model_config.dtype} is not supported on a GPU (bfloat16)"
    if parallel.tensor_parallel_size > 1:
        yield f"tensor-parallel size {parallel.tensor_parallel_size} is not supported on a GPU"
    if scheduler.max_num_seqs > MAX_SEQS:
        yield (
            f"max_num_seqs is {scheduler.max_num_seqs} and kernels take at most {MAX_SEQS} "
            f"sequences in a step; give --max-num-seqs {MAX_SEQS}"
        )
    if getattr(parallel, "enable_dbo", False):
        yield "microbatches (--enable-dbo) are not supported"
    # A step is one call: there is nothing to break a graph at, or to compile.
    if env_text("VLLM_USE_BREAKABLE_CUDAGRAPH") == "1":
        yield "VLLM_USE_BREAKABLE_CUDAGRAPH is not supported"
    mode = getattr(config.compilation_config, "mode", None)
    if getattr(mode, "name", "") == "STOCK_TORCH_COMPILE":
        yield "compilation mode STOCK_TORCH_COMPILE is not supported"


def compile_options(
    config: Any, rank: int, accelerator: Accelerator | None = None
) -> CompileOptions:
    """What to compile for tensor-parallel rank ``rank`` of ``config``, which ``refusal`` let pass.
    Raises UsageError."""
    model = config.model_config
    is_dummy = config.load_config.load_format == "dummy"
    target = accelerator.target if accelerator is not None else None
    return CompileOptions(
        model=model.model,
        target=target or "cpu",
        dtype=_DTYPES[str(model.dtype)],
        quantization=read_quantization(),
        load_format="dummy" if is_dummy else "auto",
        max_model_len=model.max_model_len,
        revision=model.revision,
        tensor_parallel_size=config.parallel_config.tensor_parallel_size,
        tensor_parallel_rank=rank,
    )
