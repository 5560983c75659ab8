"""DeviceModel: a GPU bundle on streams and in memory of its caller's, who has an engine of his own.

The ctypes face of ``artifact/abi_device.h``. Pointers are whole numbers: addresses on the device.
Nothing here waits or allocates once the model is bound, so a step may be captured.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_int32, c_int64, c_uint32, c_uint64
from ctypes import c_void_p as pointer
from dataclasses import dataclass

from sinterlm.artifact.bundle import Bundle
from sinterlm.errors import UsageError
from sinterlm.runtime import library as abi
from sinterlm.runtime.opening import Opened, StepSizes

OPEN_BORROW = 4
#: Of weights and workspace, in bytes.
ALIGNMENT = 256


class BindArgs(ctypes.Structure):
    """``sl_bind_args``."""

    _fields_ = (
        ("size", c_uint32),
        ("stream", pointer),
        ("workspace", pointer),
        ("workspace_bytes", c_uint64),
    )


class EnqueueArgs(ctypes.Structure):
    """``sl_enqueue_args``."""

    _fields_ = (
        ("size", c_uint32),
        ("stream", pointer),
        ("num_tokens", c_int32),
        ("num_seqs", c_int32),
        ("num_sample_rows", c_int32),
        ("is_decode", c_int32),
        ("token_ids", pointer),
        ("positions", pointer),
        ("kv_slots", pointer),
        ("page_table", pointer),
        ("query_start", pointer),
        ("context_lens", pointer),
        ("sample_rows", pointer),
        ("page_table_stride", c_int32),
        ("page_tokens", c_int32),
        ("page_stride", c_int64),
        ("token_stride", c_int32),
        ("head_stride", c_int32),
        ("k_base", pointer),
        ("v_base", pointer),
        ("out_logits", pointer),
        ("out_tokens", pointer),
        ("out_hidden", pointer),
        ("hidden_stride", c_int32),
    )


class EnqueueHeadArgs(ctypes.Structure):
    """``sl_enqueue_head_args``."""

    _fields_ = (
        ("size", c_uint32),
        ("stream", pointer),
        ("num_rows", c_int32),
        ("hidden", pointer),
        ("out_logits", pointer),
        ("out_tokens", pointer),
    )


#: Every struct by its name in ``abi_device.h``.
STRUCTS: dict[str, type[ctypes.Structure]] = {
    "sl_bind_args": BindArgs,
    "sl_enqueue_args": EnqueueArgs,
    "sl_enqueue_head_args": EnqueueHeadArgs,
}

_FUNCTIONS: dict[str, abi.Signature] = {
    **abi.FUNCTIONS,
    "sl_bind": (c_int32, (pointer, POINTER(BindArgs))),
    "sl_enqueue": (c_int32, (pointer, POINTER(EnqueueArgs))),
    "sl_enqueue_head": (c_int32, (pointer, POINTER(EnqueueHeadArgs))),
}


@dataclass(frozen=True)
class PagedTensors:
    """KV memory of the caller's: number d of token t, KV head h of page p of a layer lies at
    ``base + p * page_stride + t * token_stride + h * head_stride + d``, in bf16."""

    k: tuple[int, ...]  #: address of every layer's first key
    v: tuple[int, ...]  #: and value
    page_tokens: int
    page_stride: int  #: elements, a multiple of 16, as are the next two
    token_stride: int
    head_stride: int


@dataclass(frozen=True)
class DeviceStep:
    """One step; arrays are int32 on the device. Rows of padding have slot -1, and sequences of
    padding no tokens and a context of 0."""

    num_tokens: int
    num_seqs: int
    is_decode: bool  #: every sequence has one token, or none
    token_ids: int  #: [num_tokens]
    positions: int  #: [num_tokens]
    kv_slots: int  #: [num_tokens] page * page_tokens + place in it
    page_table: int  #: [num_seqs][page_table_stride]
    query_start: int  #: [num_seqs + 1]
    context_lens: int  #: [num_seqs] tokens in the cache after this step
    page_table_stride: int


class DeviceModel(Opened):
    """A bundle whose work its caller enqueues."""

    def __init__(self, bundle: Bundle, sizes: StepSizes, weights: int | None = None) -> None:
        """Open for ``sizes``. ``weights`` is where the packed file's bytes lie on the device,
        aligned to 256; without it the library brings them there. ``bind`` comes before the first
        step. Raises BundleError, ResourceError, RuntimeFault."""
        args = abi.OpenArgs(flags=OPEN_BORROW, num_threads=1, weights_base=weights)
        super().__init__(bundle, sizes, args, _FUNCTIONS)
        self.workspace_bytes = int(self.describe()["workspace_bytes"])
        self._kv: PagedTensors | None = None

    def bind(self, stream: int, workspace: int) -> None:
        """Give the model ``workspace_bytes`` on the device, aligned to 256, and fill what must be
        filled, on ``stream``, for which it waits."""
        args = BindArgs(ctypes.sizeof(BindArgs), stream, workspace, self.workspace_bytes)
        self._library.call("sl_bind", self._open_handle(), ctypes.byref(args))

    def use_kv(self, kv: PagedTensors) -> None:
        """Where steps keep keys and values from now on. Raises UsageError."""
        layers = self.manifest.shape.num_layers
        if (len(kv.k), len(kv.v)) != (layers, layers):
            raise UsageError(f"addresses of {len(kv.k)} and {len(kv.v)} layers, of {layers}")
        self._kv = kv
        self._k, self._v = (pointer * layers)(*kv.k), (pointer * layers)(*kv.v)

    def enqueue(
        self, step: DeviceStep, stream: int, hidden: int, hidden_stride: int
    ) -> None:  # fmt: skip
        """Enqueue ``step`` on ``stream``; rows [num_tokens] of bf16 at ``hidden``,
        ``hidden_stride`` apart, get the final-normed hidden states. Raises RuntimeFault,
        UsageError."""
        if self._kv is None:
            raise UsageError("use_kv() comes before the first step")
        kv = self._kv
        args = EnqueueArgs(
            size=ctypes.sizeof(EnqueueArgs), stream=stream,
            page_tokens=kv.page_tokens, page_stride=kv.page_stride, token_stride=kv.token_stride,
            head_stride=kv.head_stride, k_base=ctypes.addressof(self._k),
            v_base=ctypes.addressof(self._v), out_hidden=hidden, hidden_stride=hidden_stride,
            **vars(step),
        )  # fmt: skip
        self._library.call("sl_enqueue", self._open_handle(), ctypes.byref(args))

    def enqueue_head(self, hidden: int, rows: int, stream: int, logits: int) -> None:
        """Enqueue the head of ``rows`` hidden states [rows][H] bf16, at most ``max_sample_rows``;
        ``logits`` gets [rows][vocabulary rounded up to 64] float32. Raises RuntimeFault."""
        args = EnqueueHeadArgs(
            ctypes.sizeof(EnqueueHeadArgs), stream, rows, hidden, logits, None
        )  # fmt: skip
        self._library.call("sl_enqueue_head", self._open_handle(), ctypes.byref(args))
