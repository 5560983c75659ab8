"""The ctypes face of ``sl_memory`` and ``sl_time`` in ``artifact/abi_device.h``: what memory the
device has, and a library for it, opened with noise for weights, whose launches are timed.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_uint32, c_uint64
from ctypes import c_void_p as pointer
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinterlm.artifact.manifest import ABI_VERSION
from sinterlm.errors import BundleError, ResourceError
from sinterlm.runtime import library as abi

OPEN_NOISE = 8
#: Positions of the rope table at least, and tokens of a page.
_MODEL_LEN, PAGE = 4096, 64


#: A buffer that a launch writes: what the table calls it, its element type, bytes to look at.
Output = tuple[str, str, int]


class MemoryArgs(ctypes.Structure):
    """``sl_memory_args``."""

    _fields_ = (
        ("size", c_uint32),
        ("max_tokens", c_int32),
        ("max_seqs", c_int32),
        ("max_sample_rows", c_int32),
        ("max_model_len", c_int32),
        ("num_slots", c_int32),
        ("out_free", POINTER(c_uint64)),
        ("out_total", POINTER(c_uint64)),
        ("out_workspace", POINTER(c_uint64)),
    )


class TimeArgs(ctypes.Structure):
    """``sl_time_args``."""

    _fields_ = (
        ("size", c_uint32),
        ("launch", c_int32),
        ("num_tokens", c_int32),
        ("num_sample_rows", c_int32),
        ("num_seqs", c_int32),
        ("context", c_int32),
        ("kv", POINTER(abi.Kv)),
        ("copy_bytes", c_int64),
        ("copies", c_int32),
        ("launches", c_int32),
        ("samples", c_int32),
        ("warmup_us", c_float),
        ("out_us", POINTER(c_float)),
    )


#: Every struct by its name in ``abi_device.h``; hosts with a stream of their own have the others.
STRUCTS: dict[str, type[ctypes.Structure]] = {
    "sl_memory_args": MemoryArgs,
    "sl_time_args": TimeArgs,
}


def _function(path: Path, name: str, *types: Any) -> Callable[..., int]:
    """A function of a loaded library that returns a status. Raises BundleError without it."""
    try:
        function = getattr(ctypes.CDLL(str(path)), name)
    except AttributeError as exc:
        raise BundleError(
            f"{path} is of an earlier SinterLM and has no {name}; rebuild the bundle with "
            "`sinterlm compile MODEL`"
        ) from exc
    function.restype, function.argtypes = c_int32, types
    bound: Callable[..., int] = function
    return bound


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a device, and those that a model works in, beside weights and KV pages."""

    free: int
    total: int
    workspace: int


def device_memory(
    path: Path, *, max_tokens: int, max_seqs: int, max_sample_rows: int, max_model_len: int
) -> DeviceMemory:
    """Of the device that the GPU library at ``path`` would be opened on, for a model of such sizes.

    Raises ResourceError where there is no driver or no device, BundleError for a library that is
    too old, RuntimeFault otherwise.
    """
    library = abi.Library(path)
    ask = _function(path, "sl_memory", POINTER(MemoryArgs))
    out = [c_uint64() for _ in range(3)]
    args = MemoryArgs(ctypes.sizeof(MemoryArgs), max_tokens, max_seqs, max_sample_rows,
                      max_model_len, 0, *map(ctypes.pointer, out))  # fmt: skip
    status = ask(ctypes.byref(args))
    if status == abi.SL_MISMATCH:
        raise ResourceError(library.last_error())
    if status != abi.SL_OK:
        raise library.error("sl_memory", status)
    return DeviceMemory(*(number.value for number in out))


@dataclass(frozen=True)
class Step:
    """A step that a launch is timed in: ``seqs`` sequences of ``tokens // seqs`` tokens each."""

    tokens: int
    rows: int = 0  #: that are sampled
    seqs: int = 1
    keys: int = 0  #: of each sequence, those of the step among them; 0 = these alone

    @property
    def context(self) -> int:
        """Keys of each sequence."""
        return self.keys or self.tokens // self.seqs

    @property
    def pages(self) -> int:
        """That the sequences fill."""
        return self.seqs * -(-self.context // PAGE)


@dataclass(frozen=True)
class Train:
    """How launches are timed: ``launches`` one behind the other are a sample, each with the next of
    ``copies`` of the weights, ``copy_bytes`` apart, or with the next pages where it reads them."""

    copies: int
    copy_bytes: int
    launches: int
    samples: int
    warmup_us: float = 0.0  #: before the first sample, at least one of which is run and not told


class TimedLibrary:
    """A library for a GPU with noise for weights and in ``pages`` pages, for any of ``steps``.

    Raises ResourceError where there is no driver, or another device than the library is for, or
    not the memory; RuntimeFault where the device fails.
    """

    def __init__(self, path: Path, steps: Sequence[Step], pages: int = 0) -> None:
        max_tokens = max((s.tokens for s in steps), default=1)
        max_context = max((s.context for s in steps), default=1)
        self._library = abi.Library(path)
        self._time = _function(path, "sl_time", pointer, POINTER(TimeArgs))
        self._peek = _function(path, "sl_peek", pointer, c_char_p, pointer, c_int64)
        facts = json.loads(self._library.describe(None))
        layers = facts["shape"]["num_layers"]
        inv_freq = 1e4 ** -np.linspace(0, 1, facts["shape"]["head_dim"] // 2, endpoint=False)
        windows = np.zeros(layers, np.int32)
        args = abi.OpenArgs(
            size=ctypes.sizeof(abi.OpenArgs), abi_version=ABI_VERSION,
            layout_hash=facts["layout_hash"], flags=OPEN_NOISE, num_threads=1,
            weights_path=b"noise", weights_bytes=facts["weights_bytes"], max_tokens=max_tokens,
            max_seqs=max((s.seqs for s in steps), default=1), max_sample_rows=max_tokens,
            max_model_len=max(_MODEL_LEN, max_context),
            rms_eps=1e-6, qk_eps=1e-6, attention_scale=1, rope_attention_factor=1,
            num_inv_freq=len(inv_freq), inv_freq=inv_freq.ctypes.data,
            num_windows=layers, windows=windows.ctypes.data,
        )  # fmt: skip
        self._model = pointer()
        try:
            self._library.call("sl_open", ctypes.byref(args), ctypes.byref(self._model))
        except BundleError as exc:  # there is no bundle that could be made again
            raise ResourceError(self._library.last_error()) from exc
        self._kv = abi.Kv()
        most = max(pages, max((s.pages for s in steps), default=1))
        kv = abi.KvArgs(ctypes.sizeof(abi.KvArgs), most, PAGE)
        try:
            self._library.call("sl_kv_alloc", self._model, ctypes.byref(kv), ctypes.byref(self._kv))
        except Exception:
            self.close()
            raise

    def __enter__(self) -> TimedLibrary:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the device's memory back."""
        self._library.release("sl_close", self._model)
        self._model = pointer()

    def describe(self) -> dict[str, Any]:
        """``sl_describe``: ``device`` and ``driver`` among others."""
        facts: dict[str, Any] = json.loads(self._library.describe(self._model.value))
        return facts

    def time(self, launch: int, step: Step, train: Train) -> list[float]:
        """Microseconds of one launch, a number per sample. Raises RuntimeFault."""
        out = (c_float * train.samples)()
        args = TimeArgs(
            ctypes.sizeof(TimeArgs), launch, step.tokens, step.rows, step.seqs, step.context,
            ctypes.pointer(self._kv), train.copy_bytes, train.copies, train.launches,
            train.samples, train.warmup_us, out,
        )  # fmt: skip
        self._check("sl_time", self._time(self._model, ctypes.byref(args)))
        return list(out)

    def outputs(
        self, launch: int, step: Step, names: Sequence[Output]
    ) -> dict[str, NDArray[np.float32]]:
        """What a launch leaves of noise, which is the same for every library. Raises RuntimeFault.

        It is run three times: what it adds up is added three times.
        """
        self.time(launch, step, Train(1, 0, 1, 1))
        found = {}
        for name, kind, nbytes in names:
            raw = np.empty(nbytes // 2, np.uint16)
            self._check("sl_peek", self._peek(
                self._model, name.encode(), raw.ctypes.data, raw.nbytes))  # fmt: skip
            is_wide = kind == "*fp32"
            found[name] = (raw if is_wide else raw.astype(np.uint32) << 16).view(np.float32)
        return found

    def _check(self, name: str, status: int) -> None:
        if status != abi.SL_OK:
            raise self._library.error(name, status)
