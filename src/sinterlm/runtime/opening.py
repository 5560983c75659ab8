"""What every opened bundle is: a loaded library, the handle of a model in it, and their end."""

from __future__ import annotations

import ctypes
import json
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np

from sinterlm.artifact.bundle import Bundle
from sinterlm.artifact.manifest import ABI_VERSION, Manifest
from sinterlm.errors import BundleError, UsageError
from sinterlm.runtime import library as abi
from sinterlm.runtime.library import Library


@dataclass(frozen=True)
class StepSizes:
    """The most that one step may hold; sizes the arrays of a model."""

    max_tokens: int
    max_seqs: int
    max_sample_rows: int
    max_model_len: int  #: positions
    num_slots: int = 0  #: that remember a sequence's last sampled token


class Opened:
    """A bundle that is open until ``close``, or until nobody holds it any more."""

    def __init__(
        self, bundle: Bundle, sizes: StepSizes, args: abi.OpenArgs,
        functions: Mapping[str, abi.Signature] = abi.FUNCTIONS,
    ) -> None:  # fmt: skip
        """``sl_open`` with ``args``, which the caller gave workers, flags and ranks, and
        ``weights_base`` where weights are in memory already; the rest is filled in here. Raises
        BundleError, ResourceError, RuntimeFault."""
        manifest = bundle.manifest
        if bundle.weights_path is None:
            raise BundleError(
                f"{bundle.root} holds code without weights; compile the model itself with "
                "`sinterlm compile MODEL`"
            )
        self.manifest: Manifest = manifest
        self._max_rows = sizes.max_sample_rows
        self._library = Library(bundle.library_path, functions)
        constants = manifest.constants
        inv_freq = np.array(constants.inv_freq, np.float64)
        windows = np.array(constants.windows, np.int32)
        args.size = ctypes.sizeof(abi.OpenArgs)
        args.abi_version = ABI_VERSION
        args.layout_hash = manifest.layout_hash
        args.weights_bytes = os.stat(bundle.weights_path).st_size
        if not args.weights_base:
            args.weights_path = os.fsencode(bundle.weights_path)
        for name, value in vars(sizes).items():
            setattr(args, name, value)
        args.rms_eps = constants.rms_eps
        args.qk_eps = constants.qk_eps
        args.attention_scale = constants.attention_scale
        args.rope_attention_factor = constants.rope_attention_factor
        args.num_inv_freq, args.inv_freq = len(inv_freq), inv_freq.ctypes.data
        args.num_windows, args.windows = len(windows), windows.ctypes.data
        handle = ctypes.c_void_p()
        self._library.call("sl_open", ctypes.byref(args), ctypes.byref(handle))
        self._handle = handle.value
        # A model that is dropped gives its memory back too; at exit the system takes it all.
        self._finalizer = weakref.finalize(self, self._library.release, "sl_close", handle.value)
        self._finalizer.atexit = False

    def describe(self) -> dict[str, Any]:
        """What the library says of itself: isa, shapes, threads, and per fused op calls and ns."""
        facts: dict[str, Any] = json.loads(self._library.describe(self._open_handle()))
        return facts

    def close(self) -> None:
        """Stop the workers and give all memory back; further calls raise UsageError."""
        self._handle = None
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open_handle(self) -> int:
        if self._handle is None:
            raise UsageError("this model is closed; open it again")
        return self._handle
