"""Model: a bundle opened for running. ``step`` is one native call for forward pass and sampling.

Not thread-safe: its owner serialises calls (each call releases the GIL while it runs). Refuses what
does not fit the arrays it was opened for; the native side refuses what is out of range.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinterlm.artifact.bundle import Bundle
from sinterlm.errors import ResourceError, RuntimeFault, UsageError
from sinterlm.runtime import library as abi
from sinterlm.runtime.batch import Float32, RowSampling, StepBatch, StepResult
from sinterlm.runtime.machine import read_machine
from sinterlm.runtime.opening import Opened, StepSizes
from sinterlm.runtime.ranks import RankLink

#: Weights up to this share of memory are copied into huge pages; larger ones stay in the file's.
_COPY_SHARE = 0.25

_INT32_MAX = (1 << 31) - 1


@dataclass(frozen=True)
class KvMemory:
    """KV pages in memory of the caller's; see ``sl_kv`` of abi.h."""

    addresses: tuple[int, ...]  #: of every layer's first page
    num_pages: int
    page_tokens: int  #: a multiple of 16
    page_stride: int  #: elements from page to page of a layer
    head_stride: int  #: elements from KV head to KV head of a page


class Model(Opened):
    """A loaded library with its weights, and at most one KV cache, its own or its caller's."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        num_threads: int,
        cpu_ids: Sequence[int] | None = None,
        max_tokens: int,
        max_seqs: int,
        max_sample_rows: int,
        max_model_len: int,
        num_slots: int = 0,
        link: RankLink | None = None,
        eager: bool = False,
    ) -> None:
        """Open ``bundle``; the ``max_*`` size the arrays of one step.

        ``cpu_ids`` pins worker i to CPU cpu_ids[i]. ``link`` leads to the other ranks where the
        bundle is one rank's part. ``eager``: a GPU replays no graphs; CPUs, which have none, refuse
        it. Raises BundleError, ResourceError, RuntimeFault, UsageError.
        """
        if cpu_ids is not None and len(cpu_ids) != num_threads:
            raise UsageError(f"cpu_ids names {len(cpu_ids)} CPUs and num_threads={num_threads}")
        cpus = None if cpu_ids is None else np.array(cpu_ids, np.int32)
        weights = bundle.weights_path
        in_huge_pages = weights is not None and fits_copy(weights.stat().st_size)
        args = abi.OpenArgs(
            flags=(abi.OPEN_HUGE_PAGES if in_huge_pages else 0) | (abi.OPEN_EAGER if eager else 0),
            num_threads=num_threads,
            cpu_ids=None if cpus is None else cpus.ctypes.data,
        )
        self._link = link
        if link is not None:
            args.rank, args.reduce = link.rank, link.callback
        super().__init__(
            bundle, StepSizes(max_tokens, max_seqs, max_sample_rows, max_model_len, num_slots), args
        )
        self._kv: abi.Kv | None = None
        self._borrowed: NDArray[np.uintp] | None = None  # addresses that bind_kv() was given
        self._rows = (abi.Sampling * max_sample_rows)()
        for row in self._rows:
            row.size = ctypes.sizeof(abi.Sampling)

    # -- memory ----------------------------------------------------------------------------------

    def kv_bytes_per_page(self, page_tokens: int) -> int:
        """Bytes of one page of all layers and KV heads."""
        return page_tokens * self.manifest.kv_bytes_per_token

    def alloc_kv(self, num_pages: int, page_tokens: int) -> None:
        """Make the KV cache, replacing an earlier one. Memory is taken as pages are first used.

        Raises ResourceError where the system refuses, UsageError and RuntimeFault for bad sizes.
        """
        handle = self._open_handle()
        if not 0 < num_pages <= _INT32_MAX:
            raise UsageError(f"num_pages={num_pages} must be between 1 and {_INT32_MAX}")
        self._free_kv()
        args = abi.KvArgs(ctypes.sizeof(abi.KvArgs), num_pages, page_tokens)
        kv = abi.Kv()
        self._library.call("sl_kv_alloc", handle, ctypes.byref(args), ctypes.byref(kv))
        self._kv = kv

    def bind_kv(self, memory: KvMemory) -> None:
        """Use pages of the caller's, who keeps them for as long as steps are run, instead of an
        earlier cache. Raises UsageError after ``close``."""
        self._open_handle()
        self._free_kv()
        self._borrowed = np.array(memory.addresses, np.uintp)
        self._kv = abi.Kv(
            ctypes.sizeof(abi.Kv), memory.num_pages, memory.page_tokens, len(memory.addresses),
            memory.page_stride, memory.head_stride, self._borrowed.ctypes.data,
        )  # fmt: skip

    def close(self) -> None:
        """Stop the workers and give all memory back; further calls raise UsageError."""
        self._kv = None
        super().close()

    # -- running ---------------------------------------------------------------------------------

    def step(self, batch: StepBatch) -> StepResult:
        """Run one step: write the KV of its tokens, sample its rows.

        Raises RuntimeFault naming the argument that is out of range, UsageError after ``close``.
        """
        return self.decode(batch, 1)[0]

    def decode(self, batch: StepBatch, num_steps: int) -> list[StepResult]:
        """Run up to ``num_steps`` steps in one call, each feeding every sequence what it drew in
        the one before; fewer if a row draws one of its ``stop_tokens``. One result per step.

        More than one step needs sequences of one token each, all of them sampled, without
        penalties and logits, and page tables that reach to the last step. Raises as ``step``.
        """
        handle = self._open_handle()
        rows, width = len(batch.sample_rows), batch.max_logprobs
        sampled = bool(batch.sampling)
        _check_shapes(batch, self._max_rows, self.manifest.shape.vocab_size)
        drawn = rows if sampled else 0
        tokens = np.empty((num_steps, drawn), np.int32)
        logprobs = np.empty((num_steps, drawn), np.float32)
        ranks = np.empty((num_steps, drawn), np.int32)
        top_ids = np.empty((num_steps, drawn, width), np.int32)
        top_logprobs = np.empty((num_steps, drawn, width), np.float32)
        logits = self._logits(rows) if batch.want_logits else None
        for row, params in zip(self._rows, batch.sampling, strict=False):
            fill_row(row, params)
        flags = (abi.STEP_SAMPLE if sampled else 0) | (abi.STEP_LOGITS if batch.want_logits else 0)
        steps_run = ctypes.c_int32()
        args = abi.StepArgs(
            **self._inputs(batch),
            # A step that draws nothing still fills the cache; asking for the logits of its zero
            # rows says so.
            flags=flags or abi.STEP_LOGITS,
            num_sample_rows=rows if flags else 0,
            sample_rows=_pointer(batch.sample_rows, np.int32),
            sampling=self._rows,
            max_logprobs=width,
            out_tokens=_pointer(tokens, np.int32),
            out_logprobs=_pointer(logprobs, np.float32),
            out_ranks=_pointer(ranks, np.int32),
            out_top_ids=_pointer(top_ids, np.int32),
            out_top_logprobs=_pointer(top_logprobs, np.float32),
            out_logits=None if logits is None else _pointer(logits, np.float32),
            num_steps=num_steps,
            out_num_steps=ctypes.pointer(steps_run),
        )
        self._run(handle, args)
        return [
            StepResult(tokens[i], logprobs[i], ranks[i], top_ids[i], top_logprobs[i], logits)
            for i in range(steps_run.value)
        ]

    def hidden(self, batch: StepBatch, out: Float32) -> None:
        """Run one step that samples nothing; ``out`` [T, H] float32 gets the final-normed hidden
        states of its tokens, which ``head`` takes. Raises as ``step``."""
        _check_shapes(batch, self._max_rows, self.manifest.shape.vocab_size)
        expected = (batch.num_tokens, self.manifest.shape.hidden_size)
        if out.shape != expected:
            raise UsageError(f"out has shape {out.shape} and must have {expected}")
        args = abi.StepArgs(
            **self._inputs(batch),
            flags=abi.STEP_HIDDEN,
            out_hidden=_pointer(out, np.float32),
            num_steps=1,
        )
        self._run(self._open_handle(), args)

    def head(self, hidden: Float32) -> Float32:
        """Logits [R, V] of final-normed hidden states [R, H] float32."""
        rows = np.ascontiguousarray(hidden, np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.manifest.shape.hidden_size:
            raise UsageError(
                f"hidden has shape {rows.shape}; it must be [rows, "
                f"{self.manifest.shape.hidden_size}]"
            )
        logits = self._logits(len(rows))
        if len(rows) == 0:
            return logits
        args = abi.HeadArgs(
            size=ctypes.sizeof(abi.HeadArgs),
            num_rows=len(rows),
            hidden=_pointer(rows, np.float32),
            out_logits=_pointer(logits, np.float32),
        )
        self._library.call("sl_head", self._open_handle(), ctypes.byref(args))
        return logits

    # -- facts -----------------------------------------------------------------------------------

    def probe(self, seconds: float = 1.0) -> tuple[float, float]:
        """(GFLOP/s of the GEMM instruction, GB/s of reading), measured with the model's workers.

        Raises ResourceError when memory does not hold the buffer that reading is measured on.
        """
        needed = int(self.describe()["probe_bytes"])
        available = read_machine().memory_available
        if needed > available:
            raise ResourceError(
                f"measuring bandwidth takes a buffer of {needed / 1e6:.0f} MB, and "
                f"{available / 1e6:.0f} MB of memory are left to this process; free some"
            )
        gflops, gbytes = ctypes.c_double(), ctypes.c_double()
        handle = self._open_handle()
        self._library.call(
            "sl_probe", handle, float(seconds), ctypes.byref(gflops), ctypes.byref(gbytes)
        )
        return gflops.value, gbytes.value

    # -- inside ----------------------------------------------------------------------------------

    def _run(self, handle: int, args: abi.StepArgs) -> None:
        """``sl_step``; what the link to the other ranks raised is the cause of its failure."""
        try:
            self._library.call("sl_step", handle, ctypes.byref(args))
        except RuntimeFault as fault:
            if self._link is None or self._link.error is None:
                raise
            cause, self._link.error = self._link.error, None
            raise fault from cause

    def _inputs(self, batch: StepBatch) -> dict[str, Any]:
        """The fields of ``StepArgs`` that say what is fed, and into which cache."""
        if self._kv is None:
            raise UsageError("alloc_kv() or bind_kv() comes before the first step")
        return {
            "size": ctypes.sizeof(abi.StepArgs),
            "num_seqs": batch.num_seqs,
            "num_tokens": batch.num_tokens,
            "token_ids": _pointer(batch.token_ids, np.int32),
            "positions": _pointer(batch.positions, np.int32),
            "query_start": _pointer(batch.query_start, np.int32),
            "context_lens": _pointer(batch.context_lens, np.int32),
            "page_table": _pointer(batch.page_table, np.int32),
            "page_table_stride": batch.page_table.shape[1],
            "slots": None if batch.slots is None else _pointer(batch.slots, np.int32),
            "kv": ctypes.pointer(self._kv),
        }

    def _free_kv(self) -> None:
        kv, self._kv = self._kv, None
        borrowed, self._borrowed = self._borrowed, None
        if kv is not None and borrowed is None:
            self._library.release("sl_kv_free", self._handle, ctypes.byref(kv))

    def _logits(self, rows: int) -> Float32:
        return np.empty((rows, self.manifest.shape.vocab_size), np.float32)


def fits_copy(weights_bytes: int) -> bool:
    """Whether weights of that size are copied into huge pages rather than mapped."""
    return weights_bytes <= _COPY_SHARE * read_machine().memory_limit


def fill_row(row: abi.Sampling, params: RowSampling) -> None:
    """Write one row's parameters into its struct; arrays are borrowed for the step."""
    row.temperature = params.temperature
    row.top_p = params.top_p
    row.min_p = params.min_p
    row.top_k = min(params.top_k, _INT32_MAX)
    row.repetition_penalty = params.repetition_penalty
    row.presence_penalty = params.presence_penalty
    row.frequency_penalty = params.frequency_penalty
    row.seed = params.seed
    row.position = params.position
    row.num_logprobs = params.num_logprobs
    row.num_prompt_tokens = len(params.prompt_tokens)
    row.prompt_tokens = _optional(params.prompt_tokens, np.int32)
    row.num_output_tokens = len(params.output_tokens)
    row.output_tokens = _optional(params.output_tokens, np.int32)
    row.num_bias = len(params.bias_ids)
    row.bias_ids = _optional(params.bias_ids, np.int32)
    row.bias = _optional(params.bias, np.float32)
    row.allowed = None if params.allowed is None else _pointer(params.allowed, np.uint32)
    row.num_stop_tokens = len(params.stop_tokens)
    row.stop_tokens = _optional(params.stop_tokens, np.int32)


def _check_shapes(batch: StepBatch, max_rows: int, vocab_size: int) -> None:
    """What the native side cannot see: that every array is as long as the counts say."""
    lengths = {
        "positions": (len(batch.positions), batch.num_tokens),
        "query_start": (len(batch.query_start), batch.num_seqs + 1),
        "page_table": (len(batch.page_table), batch.num_seqs),
    }
    if batch.slots is not None:
        lengths["slots"] = (len(batch.slots), batch.num_seqs)
    if batch.sampling:
        lengths["sampling"] = (len(batch.sampling), len(batch.sample_rows))
    for params in batch.sampling:
        _check_length("bias", len(params.bias), len(params.bias_ids))
        if params.allowed is not None:
            _check_length("allowed", len(params.allowed), -(-vocab_size // 32))
    for name, (have, want) in lengths.items():
        _check_length(name, have, want)
    if len(batch.sample_rows) > max_rows:
        raise UsageError(
            f"{len(batch.sample_rows)} sample rows; this model was opened for {max_rows}"
        )


def _check_length(name: str, have: int, want: int) -> None:
    if have != want:
        raise UsageError(f"{name} has {have} entries and must have {want}")


def _optional(array: NDArray[Any], dtype: type[np.generic]) -> int | None:
    """Address of an array, None when it is empty."""
    return _pointer(array, dtype) if len(array) else None


def _pointer(array: NDArray[Any], dtype: type[np.generic]) -> int:
    """Address of an array that the library can read as it is. Raises UsageError otherwise."""
    if array.dtype != dtype or not array.flags.c_contiguous:
        raise UsageError(
            f"an array of {array.dtype} (contiguous: {array.flags.c_contiguous}) was given where "
            f"contiguous {np.dtype(dtype)} is needed"
        )
    return array.ctypes.data
