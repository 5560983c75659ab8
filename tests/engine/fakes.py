"""A model without weights that trusts nothing but its pages.

Every token id is written into the page that the batch names and read back through the page table
before the next token is computed from the whole history: a page too few, shared, stale or out of
order changes the answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sinterlm.artifact.text import TextAssets
from sinterlm.engine.admission import Limits
from sinterlm.engine.engine import Engine
from sinterlm.engine.schedule import StepLimits
from sinterlm.engine.speculation import NgramProposer
from sinterlm.engine.tokenizer import Tokenizer
from sinterlm.runtime.batch import Float32, RowSampling, StepBatch, StepResult

EMPTY = -1


def _hash(*values: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:8], "little")


def ranking(history: Sequence[int], vocab_size: int, row: RowSampling | None) -> list[int]:
    """All tokens, best first, for this history; seeded rows see an order of their own."""
    seed = row.seed if row is not None and row.temperature > 0 else 0
    key = _hash(seed, len(history), *history)
    return np.random.default_rng(key).permutation(vocab_size).tolist()


def draw(history: Sequence[int], vocab_size: int, row: RowSampling) -> int:
    """The best token that mask and bias do not forbid, favouring what the bias raises."""
    bias = dict(zip(row.bias_ids.tolist(), row.bias.tolist(), strict=True))
    order = ranking(history, vocab_size, row)
    if row.allowed is not None:
        allowed = np.unpackbits(row.allowed.view(np.uint8), bitorder="little")
        order = [token for token in order if allowed[token]]
    return max(order, key=lambda t: (bias.get(t, 0.0), -order.index(t)))


class FakeModel:
    """Stands in for ``runtime.model.Model``."""

    def __init__(self, num_pages: int, page_tokens: int, vocab_size: int = 97) -> None:
        self.vocab_size = vocab_size
        self.closed = False
        self.num_steps = self.num_tokens = self.num_repeats = 0
        self.most_seqs = self.most_tokens = 0
        self.ns_per_step = 1000
        self.fail_probe: Exception | None = None
        self.fail_at: dict[int, BaseException] = {}
        self.alloc_kv(num_pages, page_tokens)

    def alloc_kv(self, num_pages: int, page_tokens: int) -> None:
        self.pages = np.full((num_pages, page_tokens), EMPTY, np.int64)

    def close(self) -> None:
        self.closed = True

    def probe(self, seconds: float) -> tuple[float, float]:
        if self.fail_probe is not None:
            raise self.fail_probe
        return 1.0, 1.0

    def describe(self) -> dict[str, object]:
        assert not self.closed
        ns = self.ns_per_step * self.num_steps
        return {"ops": [{"name": "all", "calls": self.num_steps, "ns": ns}]}

    def step(self, batch: StepBatch) -> StepResult:
        assert not self.closed
        self.num_steps += 1
        if self.num_steps in self.fail_at:
            raise self.fail_at.pop(self.num_steps)
        self.num_tokens += batch.num_tokens
        self.most_seqs = max(self.most_seqs, batch.num_seqs)
        self.most_tokens = max(self.most_tokens, batch.num_tokens)
        self._check(batch)
        self._write(batch)
        histories = [self._history(batch, int(row)) for row in batch.sample_rows]
        if batch.want_logits:
            return self._result([], [], batch, self._logits(histories))
        tokens = []
        for history, row in zip(histories, batch.sampling, strict=True):
            assert row.position == len(history)
            tokens.append(draw(history, self.vocab_size, row))
        return self._result(tokens, histories, batch, None)

    def decode(self, batch: StepBatch, num_steps: int) -> list[StepResult]:
        assert not batch.want_logits and num_steps > 1
        assert batch.num_tokens == batch.num_seqs == len(batch.sample_rows)
        self.num_repeats += 1
        results: list[StepResult] = []
        while len(results) < num_steps:
            result = self.step(batch)
            results.append(result)
            rows = [replace(row, position=row.position + 1) for row in batch.sampling]
            pairs = zip(rows, result.tokens.tolist(), strict=True)
            if any(token in row.stop_tokens for row, token in pairs):
                break
            batch = replace(
                batch,
                token_ids=result.tokens,
                positions=batch.positions + 1,
                context_lens=batch.context_lens + 1,
                sampling=tuple(rows),
            )
        return results

    def _check(self, batch: StepBatch) -> None:
        assert batch.query_start[0] == 0 and batch.query_start[-1] == batch.num_tokens
        for name in ("token_ids", "positions", "query_start", "context_lens", "page_table"):
            array = getattr(batch, name)
            assert array.dtype == np.int32 and array.flags.c_contiguous, name
        assert np.all(np.diff(batch.sample_rows) > 0)
        assert np.all((batch.token_ids >= 0) & (batch.token_ids < self.vocab_size))
        written: set[int] = set()
        read: set[int] = set()
        for i in range(batch.num_seqs):
            start, end = batch.query_start[i], batch.query_start[i + 1]
            positions = batch.positions[start:end]
            assert end > start and np.all(np.diff(positions) == 1)
            assert positions[-1] + 1 == batch.context_lens[i]
            used = self._pages_of(batch, i).tolist()
            whole = int(positions[0]) // self.pages.shape[1]
            # What this sequence writes nobody else writes, nor had read before.
            assert not set(used[whole:]) & written, "two sequences write to one page"
            assert not set(used[whole:]) & read, "a page that another reads is written to"
            written |= set(used[whole:])
            read |= set(used[:whole])

    def _pages_of(self, batch: StepBatch, seq: int) -> np.ndarray:
        count = -(-int(batch.context_lens[seq]) // self.pages.shape[1])
        return batch.page_table[seq, :count]

    def _write(self, batch: StepBatch) -> None:
        for i in range(batch.num_seqs):
            table = self._pages_of(batch, i)
            for t in range(batch.query_start[i], batch.query_start[i + 1]):
                page, offset = divmod(int(batch.positions[t]), self.pages.shape[1])
                self.pages[table[page], offset] = batch.token_ids[t]

    def _history(self, batch: StepBatch, row: int) -> list[int]:
        seq = int(np.searchsorted(batch.query_start, row, side="right")) - 1
        length = int(batch.positions[row]) + 1
        return self.pages[self._pages_of(batch, seq)].ravel()[:length].tolist()

    def _logits(self, histories: list[list[int]]) -> Float32:
        rows = [
            np.random.default_rng(_hash(*history)).standard_normal(self.vocab_size)
            for history in histories
        ]
        return np.array(rows, np.float32)

    def _result(
        self,
        tokens: list[int],
        histories: list[list[int]],
        batch: StepBatch,
        logits: Float32 | None,
    ) -> StepResult:
        width = batch.max_logprobs
        orders = [
            ranking(h, self.vocab_size, row)
            for h, row in zip(histories, batch.sampling, strict=False)
        ]
        ranks = [order.index(token) + 1 for order, token in zip(orders, tokens, strict=True)]
        top = np.array([order[:width] for order in orders], np.int32).reshape(len(tokens), width)
        return StepResult(
            tokens=np.array(tokens, np.int32),
            logprobs=np.array([-0.5 * rank for rank in ranks], np.float32),
            ranks=np.array(ranks, np.int32),
            top_ids=top,
            top_logprobs=np.broadcast_to(
                -0.5 * np.arange(1, width + 1, dtype=np.float32), top.shape
            ).copy(),
            logits=logits,
        )


def make_engine(
    *,
    num_pages: int = 64,
    page_tokens: int = 4,
    vocab_size: int = 97,
    max_model_len: int = 128,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 16,
    max_sample_rows: int | None = None,
    max_mixed_prefill_tokens: int | None = None,
    num_scheduler_steps: int = 1,
    prefix_caching: bool = True,
    num_speculative_tokens: int = 0,
    seed: int = 0,
    assets: TextAssets | None = None,
) -> Engine:
    """An engine on a FakeModel."""
    proposer = NgramProposer(num_speculative_tokens or 1, shortest=1, longest=3)
    return Engine(
        FakeModel(num_pages, page_tokens, vocab_size),
        Tokenizer(assets or TextAssets()),
        Limits(max_model_len, vocab_size),
        StepLimits(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_sample_rows=max_sample_rows or max_num_seqs,
            max_mixed_prefill_tokens=max_mixed_prefill_tokens or max_num_batched_tokens,
            num_scheduler_steps=num_scheduler_steps,
        ),
        num_pages=num_pages,
        page_tokens=page_tokens,
        prefix_caching=prefix_caching,
        proposer=proposer if num_speculative_tokens else None,
        seed=seed,
    )
