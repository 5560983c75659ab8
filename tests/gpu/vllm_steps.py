"""What vLLM's model runner hands to a model on a GPU, step by step: persistent buffers, padded
batches, graphs. NumPy arrays in the memory of a driver of no device stand for torch's tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from sinterlm.artifact.manifest import ModelShape
from sinterlm.plugin.gpu import ElementName, GpuModel
from tests.gpu.recording import RecordingDriver

ELEMENTS = {"uint8": np.uint8, "int32": np.int32, "int64": np.int64, "bfloat16": np.uint16,
            "float32": np.float32}  # fmt: skip
BLOCK, BLOCKS, MAX_LEN, MAX_TOKENS, MAX_SEQS = 16, 12, 64, 16, 4


class Tensor(np.ndarray):
    """An array with what the plugin asks of torch's tensors."""

    memory: FakeMemory

    def __array_finalize__(self, parent: Any) -> None:
        self.memory = getattr(parent, "memory", None)

    def data_ptr(self) -> int:
        return int(self.ctypes.data)

    def stride(self) -> tuple[int, ...]:
        return tuple(n // self.itemsize for n in self.strides)

    def element_size(self) -> int:
        return int(self.itemsize)

    def contiguous(self) -> Tensor:
        return self if self.flags.c_contiguous else self.memory.like(self)

    def copy_(self, source: Tensor) -> None:
        """Now, or when the graph is replayed that the stream is being captured into."""

        def copy() -> None:
            self[:] = source

        self.memory.do(copy)


class FakeMemory:
    """``DeviceMemory`` on a driver of no device."""

    def __init__(self, driver: RecordingDriver) -> None:
        self.driver = driver
        self.current = driver.stream()

    def empty(self, shape: tuple[int, ...], dtype: ElementName | str) -> Tensor:
        kind = np.dtype(ELEMENTS[dtype])
        count = int(np.prod(shape)) * kind.itemsize
        address = self.driver._block(self.driver.memory, max(count, 16))
        made = self.driver.memory[address][:count].view(kind).reshape(shape).view(Tensor)
        made.memory = self
        return made

    def zeros(self, shape: tuple[int, ...], dtype: ElementName | str) -> Tensor:
        made = self.empty(shape, dtype)
        made[:] = 0
        return made

    def like(self, values: np.ndarray) -> Tensor:
        made = self.empty(values.shape, {v: k for k, v in ELEMENTS.items()}[values.dtype.type])
        made[:] = values
        return made

    def read_file(self, path: Path, to: Tensor) -> None:
        to[:] = np.fromfile(path, np.uint8)

    def stream(self) -> int:
        return self.current

    def do(self, work: Any) -> None:
        held = self.driver.capturing.get(self.current)
        if held is None:
            work()
        else:
            held.append(work)


def kv_tensors(memory: FakeMemory, layout: str, shape: ModelShape) -> list[Tensor]:
    """One of every layer, in one allocation, full of NaN, as vLLM's backends shape them.

    ``layout`` is the order in memory of layers L, blocks B, heads H, tokens N and the numbers C of
    a token's key and value (vLLM 0.32), or ``B2NHD`` or ``2BNHD`` (vLLM before it).
    """
    layers, heads, dim = shape.num_layers, shape.num_kv_heads, shape.head_dim
    sizes = {"L": layers, "B": BLOCKS, "H": heads, "N": BLOCK, "C": 2 * dim, "D": dim, "2": 2}
    order = layout if "L" in layout else f"L{layout}"
    whole = memory.empty(tuple(sizes[axis] for axis in order), "bfloat16")
    whole[:] = 0x7FC0
    shown = "LBHNC" if "C" in order else order
    return list(whole.transpose([order.index(axis) for axis in shown]))


@dataclass
class Sequence:
    """A request: its tokens, of which ``done`` are in the cache, and its blocks."""

    tokens: list[int]
    blocks: list[int]
    done: int = 0


class Runner:
    """vLLM's model runner as far as a model sees it."""

    def __init__(self, model: GpuModel, memory: FakeMemory, layout: str) -> None:
        self.model, self.memory = model, memory
        self.pages = kv_tensors(memory, layout, model.shape)
        self.ids = memory.zeros((MAX_TOKENS,), "int32")
        self.positions = memory.zeros((MAX_TOKENS,), "int64")
        self.slots = memory.zeros((MAX_TOKENS,), "int64")
        self.starts = memory.zeros((MAX_SEQS + 1,), "int32")
        self.lens = memory.zeros((MAX_SEQS,), "int32")
        self.table = memory.zeros((MAX_SEQS, MAX_LEN // BLOCK), "int32")
        self.graphs: dict[int, tuple[int, Tensor]] = {}  # by rows: handle, hidden states

    def step(self, *runs: tuple[Sequence, int], rows: int | None = None) -> list[int]:
        """The next ``n`` tokens of each sequence; the token drawn after each. With ``rows`` the
        step is padded to so many rows and sequences and runs by a graph, which the first such step
        captures."""
        self._fill(runs, rows)
        counts = [n for _, n in runs]
        if rows is None:
            hidden = self._forward(len(runs), sum(counts), max(counts))
        else:
            hidden = self._by_graph(rows)
        logits = self.model.logits(self.memory.like(hidden[np.cumsum(counts) - 1]))
        drawn = np.asarray(logits).argmax(1).tolist()
        for (seq, count), token in zip(runs, drawn, strict=True):
            seq.done += count
            if seq.done == len(seq.tokens):
                seq.tokens.append(token)
        return drawn

    def _fill(self, runs: tuple[tuple[Sequence, int], ...], rows: int | None) -> None:
        """The buffers of a step; behind it lies what an earlier step left, or vLLM's padding."""
        at = 0
        for i, (seq, count) in enumerate(runs):
            positions = np.arange(seq.done, seq.done + count)
            mine = slice(at, at + count)
            self.ids[mine] = seq.tokens[seq.done : seq.done + count]
            self.positions[mine] = positions
            self.slots[mine] = np.array(seq.blocks)[positions // BLOCK] * BLOCK + positions % BLOCK
            self.starts[i], self.lens[i] = at, seq.done + count
            self.table[i] = 0
            self.table[i, : len(seq.blocks)] = seq.blocks
            at += count
        self.starts[len(runs) :] = at
        if rows is not None:
            self.slots[at:rows], self.lens[len(runs) :], self.table[len(runs) :] = -1, 0, 0

    def _forward(self, seqs: int, tokens: int, longest: int) -> Tensor:
        metadata = SimpleNamespace(
            num_actual_tokens=tokens, max_query_len=longest, slot_mapping=self.slots[:tokens],
            query_start_loc=self.starts[: seqs + 1], seq_lens=self.lens[:seqs],
            block_table=self.table[:seqs],
        )  # fmt: skip
        hidden: Tensor = self.model.hidden(
            self.ids[:tokens], self.positions[:tokens], metadata, self.pages
        )
        return hidden

    def _by_graph(self, rows: int) -> Tensor:
        driver, own = self.memory.driver, self.memory.current
        if rows not in self.graphs:
            self.memory.current = driver.stream()
            driver.on_capture_begin(self.memory.current, 1)
            hidden = self._forward(rows, rows, 1)
            recorded = driver.capturing.pop(self.memory.current)
            self.memory.current = own
            self.graphs[rows] = driver._handle(recorded), hidden
        graph, hidden = self.graphs[rows]
        driver.on_graph_launch(graph, own)
        return hidden


def vllm_config() -> Any:
    """A VllmConfig as far as ``GpuModel`` reads it."""
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=MAX_TOKENS, max_num_seqs=MAX_SEQS),
        model_config=SimpleNamespace(max_model_len=MAX_LEN),
    )
