"""vLLM's model classes with our library inside; imported by vLLM when it loads a model.

Each subclasses vLLM's own, so that flags and fallback are vLLM's. Which of the two runs is decided
before weights are loaded. Ours keeps one bare ``Attention`` for each layer, which vLLM sizes and
binds the KV cache by and which is never called. On a GPU it is always that of vLLM's Triton
backend, whose KV tensors and metadata are the same on AMD and NVIDIA.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from sinterlm.compile import compile_model
from sinterlm.errors import SinterError, UsageError
from sinterlm.plugin.gpu import GpuModel
from sinterlm.plugin.native import NativeModel
from sinterlm.plugin.ranks import agree, open_link, tensor_parallel_rank
from sinterlm.plugin.support import Accelerator, compile_options, refusal
from sinterlm.plugin.switch import bound_cpus, read_switch
from sinterlm.plugin.torch_device import TorchMemory, find_accelerator

logger = init_logger("vllm.plugins.sinterlm")

if TYPE_CHECKING:
    Stock: TypeAlias = nn.Module
else:
    Stock = object


class SinterModel(Stock):
    """The half that is ours; stands in front of a class of vLLM."""

    _native: NativeModel | GpuModel | None = None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        """Compile and open, or leave everything to vLLM. Raises UsageError with ``require``."""
        native, reason = _open(vllm_config)
        if native is None:
            text = f"SinterLM leaves this model to vLLM: {reason}"
            if read_switch() == "require":
                raise UsageError(f"{text}; SINTERLM_VLLM=require asks for SinterLM")
            logger.warning(text)
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            return
        nn.Module.__init__(self)
        self.config = vllm_config.model_config.hf_config
        self._native = native
        backend = _triton_attention() if isinstance(native, GpuModel) else {}
        self.attention = nn.ModuleList(
            Attention(
                native.shape.num_heads,
                native.shape.head_dim,
                native.attention_scale,
                num_kv_heads=native.shape.num_kv_heads,
                cache_config=vllm_config.cache_config,
                # A window is masked in the kernel; the cache keeps all of the context.
                prefix=f"{prefix}.model.layers.{i}.self_attn.attn".lstrip("."),
                **backend,
            )
            for i in range(native.shape.num_layers)
        )

    def forward(
        self, input_ids: torch.Tensor | None, positions: torch.Tensor,
        intermediate_tensors: Any = None, inputs_embeds: torch.Tensor | None = None,
    ) -> Any:  # fmt: skip
        """Hidden states [T, H] of the step; zeros while vLLM measures memory."""
        if self._native is None:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        if input_ids is None:
            raise RuntimeError("SinterLM takes token ids, and vLLM passed embeddings")
        metadata = get_forward_context().attn_metadata
        if isinstance(metadata, list):
            metadata = metadata[0]
        if not metadata:
            return self._native.blank(len(input_ids))
        first = metadata[self.attention[0].layer_name]
        pages = [layer.kv_cache for layer in self.attention]
        return self._native.hidden(input_ids, positions, first, pages)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits [R, V] of the rows that are sampled, on every rank."""
        if self._native is None:
            return super().compute_logits(hidden_states)
        return self._native.logits(hidden_states)

    def compute_logits_local(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The same: the head is whole on every rank."""
        if self._native is None:
            return super().compute_logits_local(hidden_states)
        return self._native.logits(hidden_states)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings; ours never leave the library."""
        if self._native is None:
            return super().embed_input_ids(input_ids)
        raise RuntimeError("SinterLM keeps no embeddings apart; set SINTERLM_VLLM=off")

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """None: they are in the bundle already."""
        if self._native is None:
            return set(super().load_weights(weights))
        next(iter(weights), None)  # vLLM's clock of loading starts with the first one
        return set()


def _triton_attention() -> dict[str, Any]:
    """What makes an ``Attention`` that of vLLM's Triton backend."""
    module = import_module("vllm.v1.attention.backends.triton_attn")
    return {"attn_backend": module.TritonAttentionBackend}


def _open(vllm_config: Any) -> tuple[NativeModel | GpuModel | None, str]:
    """Our model, or why it is not ours to run."""
    native: NativeModel | GpuModel | None = None
    accelerator = find_accelerator(vllm_config)
    reason, rank = refusal(vllm_config, accelerator), tensor_parallel_rank()
    if reason is None:
        try:
            native = _open_bundle(vllm_config, rank, accelerator)
        except SinterError as exc:
            reason = str(exc)
    reason = agree(reason)
    if reason is not None:
        if native is not None:
            native.close()
        return None, reason
    assert native is not None
    logger.info(
        "SinterLM runs this model: %s, %s, rank %d of %d, %s",
        native.dtype, native.isa, rank, vllm_config.parallel_config.tensor_parallel_size,
        f"CPUs {','.join(map(str, _cpus()))}" if accelerator is None else accelerator.name,
    )  # fmt: skip
    return native, ""


def _open_bundle(
    vllm_config: Any, rank: int, accelerator: Accelerator | None
) -> NativeModel | GpuModel:
    """The model compiled and opened. Raises SinterError."""
    bundle = compile_model(compile_options(vllm_config, rank, accelerator))
    if accelerator is not None:
        return GpuModel(bundle, vllm_config, TorchMemory("cuda"))
    return NativeModel(bundle, vllm_config, _cpus(), open_link())


def _cpus() -> tuple[int, ...]:
    """What this worker may run on."""
    return bound_cpus(os.environ) or tuple(sorted(os.sched_getaffinity(0)))


class SinterLlamaForCausalLM(SinterModel, LlamaForCausalLM):
    """Llama and what has its architecture."""


class SinterMistralForCausalLM(SinterModel, MistralForCausalLM):
    """Mistral."""


class SinterQwen2ForCausalLM(SinterModel, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5."""


class SinterQwen3ForCausalLM(SinterModel, Qwen3ForCausalLM):
    """Qwen3."""
