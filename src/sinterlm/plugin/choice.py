"""Our class or vLLM's, by what the installed vLLM has. vLLM asks for a class of this module.

Ours lean on inner parts of vLLM, which forks and patch releases rename. Where one is missing or has
another shape, vLLM's own class is handed over, and the log names what was missing.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from sinterlm.errors import UsageError
from sinterlm.plugin.switch import read_switch

#: Our class -> the module of vLLM's class that it extends.
_STOCK = {
    "SinterLlamaForCausalLM": "llama",
    "SinterMistralForCausalLM": "mistral",
    "SinterQwen2ForCausalLM": "qwen2",
    "SinterQwen3ForCausalLM": "qwen3",
}
_MODELS = "vllm.model_executor.models"

#: Module -> what we take from it: a name, ``name(parameters)`` or ``name.fields``.
_NEEDED = {
    "vllm.logger": ("init_logger",),
    "vllm.forward_context": ("get_forward_context", "ForwardContext.attn_metadata"),
    "vllm.distributed.parallel_state": ("get_tp_group",),
    "vllm.model_executor.layers.attention": (
        "Attention(num_heads head_size scale num_kv_heads cache_config prefix)",
    ),
    "vllm.platforms": ("current_platform",),
}
_NEEDED_ON_CPU = {
    "vllm.v1.attention.backends.cpu_attn": (
        "CPUAttentionMetadata.num_actual_tokens query_start_loc seq_lens block_table",
    ),
}
_NEEDED_ON_GPU = {
    "vllm.model_executor.layers.attention": ("Attention(attn_backend)",),
    "vllm.v1.attention.backends.triton_attn": (
        "TritonAttentionBackend",
        "TritonAttentionMetadata.num_actual_tokens max_query_len query_start_loc seq_lens "
        "block_table slot_mapping",
    ),
}

logger = logging.getLogger("vllm.plugins.sinterlm")


def __getattr__(name: str) -> Any:
    """The class that vLLM asks for. Raises UsageError with ``require`` where it is not ours."""
    if name not in _STOCK:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    reason = absent()
    if reason is None:
        return getattr(import_module("sinterlm.plugin.models"), name)
    text = f"SinterLM leaves this model to vLLM, which lacks {reason}"
    if read_switch() == "require":
        raise UsageError(f"{text}; SINTERLM_VLLM=require asks for SinterLM")
    logger.warning(text)
    return getattr(import_module(f"{_MODELS}.{_STOCK[name]}"), name.removeprefix("Sinter"))


def absent() -> str | None:
    """The first thing that we take from vLLM and it has not; None where all are there."""
    missing = _first_absent(_NEEDED)
    if missing is not None:
        return missing
    platform = import_module("vllm.platforms").current_platform
    on_gpu = platform.device_type == "cuda"
    return _first_absent(_NEEDED_ON_GPU if on_gpu else _NEEDED_ON_CPU)


def _first_absent(wanted: Mapping[str, tuple[str, ...]]) -> str | None:
    for module, names in wanted.items():
        try:
            found = import_module(module)
        except ImportError as exc:
            return f"{module} ({exc})"
        for needed in names:
            missing = _lacks(found, needed)
            if missing is not None:
                return f"{module}.{missing}"
    return None


def _lacks(module: Any, needed: str) -> str | None:
    """What of ``needed`` is not in ``module``."""
    name = needed.partition("(")[0].partition(".")[0]
    thing = getattr(module, name, None)
    if thing is None:
        return name
    words = needed[len(name) :].strip("().").split()
    if "(" in needed:
        known, kind = set(inspect.signature(thing).parameters), "parameter"
    else:
        known, kind = set(getattr(thing, "__annotations__", ())), "field"
    return next((f"{name}, its {kind} {word}" for word in words if word not in known), None)
