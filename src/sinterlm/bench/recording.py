"""A model that notes when each step began and ended and what it held, and that can pretend.

``pretend`` makes steps draw nothing real and take no time: with ``fill_kv`` it puts sequences at
any context length without computing their prompts. Speed does not depend on the values of K and V.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from sinterlm.errors import UsageError
from sinterlm.runtime.batch import Int32, StepBatch, StepResult
from sinterlm.runtime.model import Model
from sinterlm.runtime.roofline import Step


@dataclass(frozen=True, slots=True, eq=False)
class StepRecord:
    """One step: times of ``time.perf_counter`` around ``Model.step``, and its shape."""

    start: float
    end: float
    query_start: Int32  #: [S + 1]
    context_lens: Int32  #: [S]
    sample_rows: Int32  #: [R]

    @property
    def num_seqs(self) -> int:
        """S: sequences in the step."""
        return len(self.context_lens)

    @property
    def is_decode(self) -> bool:
        """Whether every sequence computes one token and draws the next."""
        return int(self.query_start[-1]) == self.num_seqs == len(self.sample_rows)

    def sequences(self) -> list[Step]:
        """Each sequence's share of the step."""
        # A row belongs to the last sequence that starts at or before it.
        owners = np.searchsorted(self.query_start, self.sample_rows, side="right") - 1
        rows = np.bincount(owners, minlength=self.num_seqs)
        lengths = np.diff(self.query_start)
        columns = zip(lengths.tolist(), self.context_lens.tolist(), rows.tolist(), strict=True)
        return [Step(tokens, context, num_rows) for tokens, context, num_rows in columns]


class RecordingModel(Model):
    """``runtime.model.Model`` with the two abilities above, both off at first."""

    _records: list[StepRecord] | None = None
    _pretends = False

    @contextmanager
    def recording(self) -> Iterator[list[StepRecord]]:
        """Collect a record of every step that is run inside."""
        records: list[StepRecord] = []
        self._records = records
        try:
            yield records
        finally:
            self._records = None

    @contextmanager
    def pretending(self) -> Iterator[None]:
        """Steps inside compute nothing, write no KV, and draw token 0 for every row."""
        self._pretends = True
        try:
            yield
        finally:
            self._pretends = False

    def decode(self, batch: StepBatch, num_steps: int) -> list[StepResult]:
        """Run steps, noting each with an equal share of the call's time. Raises as ``Model.decode``
        does; ``step`` is a call of one."""
        if self._pretends:
            return [_pretended(batch)] * num_steps
        start = time.perf_counter()
        results = super().decode(batch, num_steps)
        share = (time.perf_counter() - start) / len(results)
        if self._records is not None:
            self._records += [
                StepRecord(
                    start + i * share,
                    start + (i + 1) * share,
                    batch.query_start.copy(),
                    batch.context_lens + np.int32(i),
                    batch.sample_rows.copy(),
                )
                for i in range(len(results))
            ]
        return results

    def op_counters(self) -> dict[str, tuple[int, int]]:
        """(calls, nanoseconds) of each kind of fused op since the library was loaded."""
        return {op["name"]: (op["calls"], op["ns"]) for op in self.describe()["ops"]}

    def fill_kv(self, num_pages: int) -> None:
        """Copy page 0 to pages 1 … num_pages - 1, so that reading them reads real memory.

        A page that was never written is the system's one page of zeros, and stays in a cache.
        Raises UsageError before ``alloc_kv`` or for more pages than there are.
        """
        kv = self._kv
        if kv is None or not 1 <= num_pages <= kv.num_pages:
            have = 0 if kv is None else kv.num_pages
            raise UsageError(f"fill_kv({num_pages}): the cache has {have} pages")
        nbytes = self.kv_bytes_per_page(kv.page_tokens) // kv.num_layers
        layers = (ctypes.c_void_p * kv.num_layers).from_address(kv.kv_base)
        for base in layers:
            for page in range(1, num_pages):
                ctypes.memmove(base + page * nbytes, base, nbytes)


def _pretended(batch: StepBatch) -> StepResult:
    rows, width = len(batch.sample_rows), batch.max_logprobs
    return StepResult(
        tokens=np.zeros(rows, np.int32),
        logprobs=np.zeros(rows, np.float32),
        ranks=np.ones(rows, np.int32),
        top_ids=np.zeros((rows, width), np.int32),
        top_logprobs=np.zeros((rows, width), np.float32),
    )
