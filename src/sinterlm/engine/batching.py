"""From a Schedule to a StepBatch: flat numpy arrays, filled without a Python loop over tokens.

The page-table row of a running request is kept between steps and only extended.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sinterlm.engine.request import Request
from sinterlm.engine.schedule import Chunk, Schedule, StepLimits
from sinterlm.runtime.batch import Int32, RowSampling, StepBatch

#: Added to the raw logit of the one token that a row shall draw; above any logit, below infinity.
_FORCED = np.array([1e30], np.float32)


class BatchBuilder:
    """Preallocated arrays for the largest step, with ``max_pages`` pages per sequence."""

    def __init__(self, limits: StepLimits, max_pages: int) -> None:
        max_tokens = limits.max_num_batched_tokens
        self._token_ids = np.zeros(max_tokens, np.int32)
        self._positions = np.zeros(max_tokens, np.int32)
        self._ramp = np.arange(max_tokens, dtype=np.int32)
        self._tables = np.zeros((limits.max_num_seqs, max_pages), np.int32)

    def build(self, schedule: Schedule) -> StepBatch:
        """The step's arrays; valid until the next call."""
        query_start, context_lens, sample_rows, slots = [0], [], [], []
        decode_rows, decode_ids, decode_positions = [], [], []
        sampling = []
        end, width, max_logprobs = 0, 1, 0
        for chunk in schedule.chunks:
            request, first = chunk.request, chunk.request.num_computed
            start, end = end, end + chunk.num_tokens
            last = first + chunk.num_tokens
            if chunk.num_tokens == 1:  # written together below: most of a busy step is decodes
                decode_rows.append(start)
                decode_ids.append(request.tokens[first])
                decode_positions.append(first)
            else:
                self._token_ids[start:end] = request.tokens.slice(first, last)
                np.add(self._ramp[: chunk.num_tokens], first, out=self._positions[start:end])
            query_start.append(end)
            context_lens.append(last)
            width = max(width, self._extend_table(request))
            slots.append(request.slot)
            if chunk.num_rows:
                sample_rows += [start + position - first for position in chunk.scored]
                sample_rows += range(end - chunk.num_drawn, end)
                rows = [*_scored_rows(chunk), *_drawn_rows(chunk)]
                sampling += rows
                max_logprobs = max(max_logprobs, *(row.num_logprobs for row in rows))
        self._token_ids[decode_rows] = decode_ids
        self._positions[decode_rows] = decode_positions
        return StepBatch(
            token_ids=self._token_ids[:end],
            positions=self._positions[:end],
            query_start=np.array(query_start, np.int32),
            context_lens=np.array(context_lens, np.int32),
            page_table=np.ascontiguousarray(self._tables[slots, :width]),
            sample_rows=np.array(sample_rows, np.int32),
            sampling=tuple(sampling),
            max_logprobs=max_logprobs,
        )

    def _extend_table(self, request: Request) -> int:
        """Copy pages the row does not have yet; returns how many it has."""
        have = len(request.pages)
        if request.table_filled < have:
            row = self._tables[request.slot]
            row[request.table_filled : have] = request.pages[request.table_filled :]
            request.table_filled = have
        return have


def _drawn_rows(chunk: Chunk) -> list[RowSampling]:
    """How the chunk's tokens are drawn: the request's row, moved to each in turn."""
    if not chunk.samples:
        return []
    request = chunk.request
    rows = [request.row]
    rows += [replace(request.row) for _ in range(chunk.num_drafts)]
    for i, row in enumerate(rows):
        row.position = request.num_tokens + i
        output = request.tokens.slice(request.tokens.num_prompt, row.position)
        if request.group.params.has_penalties:
            row.output_tokens = output
        if request.bad_words is not None:
            rows[i] = _without(row, request.bad_words.barred(output))
    return rows


def _without(row: RowSampling, barred: set[int]) -> RowSampling:
    """The row, or one that draws none of ``barred``."""
    if not barred:
        return row
    ids = np.array(sorted(barred), np.int32)
    others = ~np.isin(row.bias_ids, ids)
    return replace(
        row,
        bias_ids=np.concatenate([row.bias_ids[others], ids]),
        bias=np.concatenate([row.bias[others], np.full(len(ids), -np.inf, np.float32)]),
    )


def _scored_rows(chunk: Chunk) -> list[RowSampling]:
    """Rows that draw the prompt's own next token, so that its logprob is reported: that is of the
    raw logits, whatever the row is drawn from."""
    tokens, wanted = chunk.request.tokens, chunk.request.group.params.prompt_logprobs
    if wanted is None:
        return []
    return [
        RowSampling(
            position=position + 1,
            num_logprobs=wanted,
            bias_ids=tokens.slice(position + 1, position + 2),
            bias=_FORCED,
        )
        for position in chunk.scored
    ]


def logits_batch(token_ids: Int32, first: int, pages: Int32) -> StepBatch:
    """One chunk of one sequence, starting at position ``first``, every row's logits wanted."""
    num = len(token_ids)
    return StepBatch(
        token_ids=np.ascontiguousarray(token_ids),
        positions=np.arange(first, first + num, dtype=np.int32),
        query_start=np.array([0, num], np.int32),
        context_lens=np.array([first + num], np.int32),
        page_table=pages.reshape(1, -1),
        sample_rows=np.arange(num, dtype=np.int32),
        want_logits=True,
    )
