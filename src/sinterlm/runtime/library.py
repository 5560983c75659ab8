"""The ctypes face of ``artifact/abi.h``: its structs field by field, a loaded library, and statuses
turned into exceptions. Refuses a library that speaks another ABI version.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_uint32, c_uint64
from ctypes import c_void_p as pointer
from pathlib import Path

from sinterlm.artifact.manifest import ABI_VERSION
from sinterlm.errors import BundleError, ResourceError, RuntimeFault, SinterError

OPEN_HUGE_PAGES, OPEN_EAGER = 1, 2
STEP_SAMPLE, STEP_LOGITS, STEP_HIDDEN = 1, 2, 4

SL_OK, SL_INVALID, SL_MISMATCH, SL_NO_MEMORY, SL_IO, SL_INTERNAL, SL_REDUCE = range(7)

#: ``sl_reduce``: context, data, count -> 0, or what went wrong.
REDUCE = ctypes.CFUNCTYPE(c_int32, pointer, pointer, c_int64)


class OpenArgs(ctypes.Structure):
    """``sl_open_args``."""

    _fields_ = (
        ("size", c_uint32),
        ("abi_version", c_uint32),
        ("layout_hash", c_uint64),
        ("flags", c_uint32),
        ("num_threads", c_int32),
        ("cpu_ids", pointer),
        ("weights_path", c_char_p),
        ("weights_base", pointer),
        ("weights_bytes", c_uint64),
        ("max_tokens", c_int32),
        ("max_seqs", c_int32),
        ("max_sample_rows", c_int32),
        ("max_model_len", c_int32),
        ("rms_eps", c_float),
        ("qk_eps", c_float),
        ("attention_scale", c_float),
        ("rope_attention_factor", c_float),
        ("num_inv_freq", c_int32),
        ("inv_freq", pointer),
        ("num_windows", c_int32),
        ("windows", pointer),
        ("num_slots", c_int32),
        ("rank", c_int32),
        ("reduce", REDUCE),
        ("reduce_context", pointer),
    )


class KvArgs(ctypes.Structure):
    """``sl_kv_args``."""

    _fields_ = (("size", c_uint32), ("num_pages", c_int32), ("page_tokens", c_int32))


class Kv(ctypes.Structure):
    """``sl_kv``."""

    _fields_ = (
        ("size", c_uint32),
        ("num_pages", c_int32),
        ("page_tokens", c_int32),
        ("num_layers", c_int32),
        ("page_stride", c_int64),
        ("head_stride", c_int64),
        ("kv_base", pointer),
    )


class Sampling(ctypes.Structure):
    """``sl_sampling``."""

    _fields_ = (
        ("size", c_uint32),
        ("temperature", c_float),
        ("top_p", c_float),
        ("min_p", c_float),
        ("top_k", c_int32),
        ("repetition_penalty", c_float),
        ("presence_penalty", c_float),
        ("frequency_penalty", c_float),
        ("seed", c_uint64),
        ("position", c_int32),
        ("num_logprobs", c_int32),
        ("prompt_tokens", pointer),
        ("num_prompt_tokens", c_int32),
        ("output_tokens", pointer),
        ("num_output_tokens", c_int32),
        ("bias_ids", pointer),
        ("bias", pointer),
        ("num_bias", c_int32),
        ("allowed", pointer),
        ("stop_tokens", pointer),
        ("num_stop_tokens", c_int32),
    )


class StepArgs(ctypes.Structure):
    """``sl_step_args``."""

    _fields_ = (
        ("size", c_uint32),
        ("flags", c_uint32),
        ("num_seqs", c_int32),
        ("num_tokens", c_int32),
        ("token_ids", pointer),
        ("positions", pointer),
        ("query_start", pointer),
        ("context_lens", pointer),
        ("page_table", pointer),
        ("page_table_stride", c_int32),
        ("slots", pointer),
        ("kv", POINTER(Kv)),
        ("num_sample_rows", c_int32),
        ("sample_rows", pointer),
        ("sampling", POINTER(Sampling)),
        ("max_logprobs", c_int32),
        ("out_tokens", pointer),
        ("out_logprobs", pointer),
        ("out_ranks", pointer),
        ("out_top_ids", pointer),
        ("out_top_logprobs", pointer),
        ("out_logits", pointer),
        ("out_hidden", pointer),
        ("num_steps", c_int32),
        ("out_num_steps", POINTER(c_int32)),
    )


class HeadArgs(ctypes.Structure):
    """``sl_head_args``."""

    _fields_ = (
        ("size", c_uint32),
        ("num_rows", c_int32),
        ("hidden", pointer),
        ("out_logits", pointer),
    )


#: Every struct by its name in ``abi.h``.
STRUCTS: dict[str, type[ctypes.Structure]] = {
    "sl_open_args": OpenArgs,
    "sl_kv_args": KvArgs,
    "sl_kv": Kv,
    "sl_sampling": Sampling,
    "sl_step_args": StepArgs,
    "sl_head_args": HeadArgs,
}

#: Result and arguments of a function.
Signature = tuple[object, tuple[object, ...]]

#: Every function of ``abi.h``.
FUNCTIONS: dict[str, Signature] = {
    "sl_abi_version": (c_uint32, ()),
    "sl_last_error": (c_char_p, ()),
    "sl_describe": (c_int64, (pointer, pointer, c_int64)),
    "sl_open": (c_int32, (POINTER(OpenArgs), POINTER(pointer))),
    "sl_close": (None, (pointer,)),
    "sl_kv_alloc": (c_int32, (pointer, POINTER(KvArgs), POINTER(Kv))),
    "sl_kv_free": (None, (pointer, POINTER(Kv))),
    "sl_step": (c_int32, (pointer, POINTER(StepArgs))),
    "sl_head": (c_int32, (pointer, POINTER(HeadArgs))),
    "sl_probe": (c_int32, (pointer, c_double, POINTER(c_double), POINTER(c_double))),
}


class Library:
    """A loaded model library. Calls release the GIL."""

    def __init__(self, path: Path, functions: Mapping[str, Signature] = FUNCTIONS) -> None:
        """Load ``path`` with its symbols kept to itself. Raises BundleError."""
        try:
            self._dll = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
            self._functions = {n: self._bind(n, kind) for n, kind in functions.items()}
        except (OSError, AttributeError) as exc:
            raise BundleError(
                f"cannot load {path}: {exc}; rebuild the bundle with `sinterlm compile MODEL`"
            ) from exc
        self.path = path
        version = self._functions["sl_abi_version"]()
        if version != ABI_VERSION:
            raise BundleError(
                f"{path} speaks ABI version {version} and this SinterLM {ABI_VERSION}; rebuild the "
                "bundle with `sinterlm compile MODEL`"
            )

    def _bind(self, name: str, signature: Signature) -> Callable[..., int]:
        function = getattr(self._dll, name)
        function.restype, function.argtypes = signature
        bound: Callable[..., int] = function
        return bound

    def call(self, name: str, *args: object) -> None:
        """Call a function that returns a status. Raises BundleError where library, weights and
        machine do not fit together or weights cannot be read, ResourceError where memory is
        short, RuntimeFault otherwise, each with the library's message."""
        status = self._functions[name](*args)
        if status != SL_OK:
            raise self.error(name, status)

    def release(self, name: str, *args: object) -> None:
        """Call a function that cannot fail."""
        self._functions[name](*args)

    def describe(self, model: int | None) -> str:
        """JSON of ``sl_describe``; counters are zero without a model."""
        needed = self._functions["sl_describe"](model, None, 0)
        if needed < 0:
            raise self.error("sl_describe", SL_NO_MEMORY)
        text = ctypes.create_string_buffer(needed)
        self._functions["sl_describe"](model, text, needed)
        return text.value.decode()

    def last_error(self) -> str:
        """The message of this thread's last failure."""
        raw = ctypes.cast(self._functions["sl_last_error"](), c_char_p).value or b""
        return raw.decode(errors="replace")

    def error(self, name: str, status: int) -> SinterError:
        """What ``call`` raises for a ``status`` that the function ``name`` has just returned."""
        message = self.last_error() or f"status {status}"
        if status in (SL_MISMATCH, SL_IO):
            return BundleError(
                f"{self.path.name}: {message}; rebuild the bundle with `sinterlm compile MODEL`"
            )
        if status == SL_NO_MEMORY:
            return ResourceError(f"{message}; free memory, or lower max_model_len or max_num_seqs")
        return RuntimeFault(f"{name}: {message}")
