"""Runs a launch table step by step in NumPy: what a host does, with Triton's interpreter for a
device. Memory is poisoned with NaN before its first use, as a device's would hold anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinterlm.backends.gpu.interpreter import ELEMENTS, Order, run_kernel
from sinterlm.backends.gpu.objects import device_of
from sinterlm.backends.gpu.signatures import SIGNATURES
from sinterlm.backends.gpu.table import Table, Unit
from sinterlm.backends.gpu.vendor import multiply, rows_of
from sinterlm.ir.fp8 import FP8_NAN
from sinterlm.ir.graph import Rope

Array = NDArray[Any]


@dataclass(frozen=True)
class Part:
    """One sequence's part of a step."""

    pages: Sequence[int]
    first: int  #: position of the first token
    tokens: Sequence[int]  #: -1 = what its slot drew last
    slot: int = 0


@dataclass(frozen=True)
class Drawn:
    """What a step gives for each sampled row."""

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    logits: NDArray[np.float32]
    hidden: NDArray[np.uint16]  #: [tokens, H] bf16, final-normed; none unless asked for


class Simulator:
    """One model with its memory. Pages hold K, then V, of ``page_tokens`` tokens of each head."""

    def __init__(
        self, table: Table, weights: NDArray[np.uint8], rope: Rope, *, max_tokens: int = 64,
        max_rows: int = 64, max_seqs: int = 8, max_len: int = 256, num_pages: int = 16,
        page_tokens: int = 16, num_slots: int = 8,
    ) -> None:  # fmt: skip
        """``weights`` are the bytes of the packed file."""
        self.table, self.weights = table, weights
        self.most: dict[Unit, int] = {"T": max_tokens, "R": max_rows, "S": max_seqs, "1": 1}
        self.arenas = {
            unit: np.full(table.arena_bytes(unit) * n, 0xFF, np.uint8)
            for unit, n in self.most.items()
        }
        for name in ("counters", "attention_counters"):
            if any(b.name == name for b in table.buffers):
                self.buffer(name)[:] = 0
        facts = table.facts
        self.page_tokens = page_tokens
        shape = (num_pages, facts["kv_heads"], 2, page_tokens, facts["head_dim"])
        self.kv = [self._unset(shape) for _ in range(facts["layers"])]
        angle = np.outer(np.arange(max_len), rope.inv_freq)
        self.inputs: dict[str, Array] = {
            "cos": (np.cos(angle) * rope.attention_factor).astype(np.float32),
            "sin": (np.sin(angle) * rope.attention_factor).astype(np.float32),
            "drawn": np.full(num_slots, -1, np.int32),
        }
        self.launches = 0
        self.only = range(len(table.launches))  #: launches of the table that steps run

    def _unset(self, shape: tuple[int, ...]) -> Array:
        """A layer's pages: NaN, as they hold numbers."""
        if self.table.facts["kv_bytes"] == 2:
            return np.full(shape, 0xFFFF, np.uint16)
        return np.full(shape, FP8_NAN[device_of(self.table).fp8], np.uint8)

    def buffer(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a buffer."""
        found = next(b for b in self.table.buffers if b.name == name)
        units = self.most[found.unit]
        start = found.offset * units
        return self.arenas[found.unit][start : start + found.nbytes * units]

    def step(
        self, *seqs: Part, order: Order = "forward", temperature: float = 0.0, seed: int = 0,
        every_row: bool = False, hidden: bool = False,
    ) -> Drawn:  # fmt: skip
        """Compute the tokens of ``seqs`` and draw after the last one of each (or after every);
        ``hidden``: give the hidden states of all."""
        lengths = [len(s.tokens) for s in seqs]
        starts = np.cumsum([0, *lengths]).astype(np.int32)
        positions = np.concatenate([s.first + np.arange(len(s.tokens)) for s in seqs])
        rows = np.arange(starts[-1]) if every_row else starts[1:] - 1
        owner = np.repeat(np.arange(len(seqs)), lengths)
        pages = np.full((len(seqs), max(len(s.pages) for s in seqs)), -1, np.int32)
        for row, seq in zip(pages, seqs, strict=True):
            row[: len(seq.pages)] = seq.pages
        page = pages[owner, positions // self.page_tokens]
        slots = np.array([s.slot for s in seqs])
        self.inputs |= {
            "tokens": np.concatenate([s.tokens for s in seqs]).astype(np.int32),
            "positions": positions.astype(np.int32),
            "slots": slots[owner].astype(np.int32),
            "kv_slots": (page * self.page_tokens + positions % self.page_tokens).astype(np.int32),
            "page_table": pages,
            "query_start": starts,
            "context_lens": np.array([s.first + len(s.tokens) for s in seqs], np.int32),
            "rows": rows.astype(np.int32),
            "row_slots": slots[owner[rows]].astype(np.int32),
            "temperature": np.full(len(rows), temperature, np.float32),
            "seeds": np.full(len(rows), seed, np.uint64),
            "draws": (positions[rows] + 1).astype(np.int32),
        }
        tokens = int(starts[-1])
        sizes = {"T": tokens, "R": len(rows), "S": len(seqs), "N": tokens if hidden else 0}
        self.run(sizes, all(n == 1 for n in lengths), order)
        return self.drawn(len(rows), tokens if hidden else 0)

    def head(self, hidden: NDArray[np.uint16]) -> Drawn:
        """The greedy draw from hidden states [R, H] bf16 that a step gave."""
        rows = len(hidden)
        self.buffer("xw").view(np.uint16)[: hidden.size] = hidden.ravel()
        zeros = np.zeros(rows, np.int32)
        self.inputs |= {
            "rows": np.arange(rows, dtype=np.int32), "row_slots": zeros - 1, "draws": zeros,
            "temperature": np.zeros(rows, np.float32), "seeds": np.zeros(rows, np.uint64),
        }  # fmt: skip
        self.run({"T": 0, "R": rows, "S": 0, "N": 0}, False, "forward", is_normed=True)
        return self.drawn(rows, 0)

    def drawn(self, rows: int, tokens: int) -> Drawn:
        """What the last step left of ``rows`` sampled rows and ``tokens`` hidden states."""
        vocab, width = self.table.facts["vocab"], self.table.facts["hidden"]
        logits = self.buffer("logits").view(np.float32)[: rows * (-(-vocab // 64) * 64)]
        return Drawn(
            self.buffer("ids").view(np.int32)[:rows].copy(),
            self.buffer("logprobs").view(np.float32)[:rows].copy(),
            logits.reshape(rows, -1)[:, :vocab].copy(),
            self.buffer("hidden").view(np.uint16)[: tokens * width].reshape(tokens, width).copy(),
        )

    def run(
        self, sizes: dict[str, int], is_decode: bool, order: Order, is_normed: bool = False
    ) -> None:
        """Every launch of the table that is among ``only`` and has programs."""
        kv = self.kv[0]
        dim = kv.shape[-1]
        values = {
            "num_tokens": sizes["T"], "num_rows": sizes["R"], "num_seqs": sizes["S"],
            "table_stride": self.inputs["page_table"].shape[1], "page_tokens": self.page_tokens,
            "page_stride": kv[0].size, "head_stride": kv[0, 0].size, "token_stride": dim,
            "is_normed": int(is_normed), "hidden_stride": self.table.facts["hidden"],
        }  # fmt: skip
        only = self.table.launches[self.only.start : self.only.stop]
        for launch, kernel in replace(self.table, launches=only).launches_of(sizes, is_decode):
            grid = [axis.count(sizes) for axis in kernel.grid]
            types = SIGNATURES[kernel.name].types(kernel.constants)
            args: dict[str, Any] = {
                name: self.argument(given, types[name], values)
                for name, given in zip(types, launch.args, strict=True)
            }
            if kernel.is_vendor:
                rows = rows_of(sizes["T"], self.most["T"])
                multiply(args["a"], args["w"], args["sums"], rows, kernel.constants)
            else:
                run_kernel(kernel.name, grid, args, kernel.constants, order)
            self.launches += 1

    def argument(self, given: str, kind: str, values: dict[str, int]) -> Array | float:
        """What a binding of the table leads to."""
        if given == "null":
            return np.zeros(0, ELEMENTS[kind])
        where, _, name = given.partition(":")
        if where == "value":
            return values[name]
        if where == "number":
            return float(name)
        if where == "input":
            return self.inputs[name]
        if where == "buffer":
            return self.buffer(name).view(ELEMENTS[kind])
        if where == "weight":
            tail = self.weights[int(name) :]
            size = np.dtype(ELEMENTS[kind]).itemsize
            return tail[: len(tail) // size * size].view(ELEMENTS[kind])
        pages = self.kv[int(name)].reshape(-1)
        half = self.page_tokens * self.kv[0].shape[-1]
        return pages if where == "k" else pages[half:]
