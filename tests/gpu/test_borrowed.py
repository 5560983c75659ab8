"""A GPU library on a stream and in memory of its caller's, as it lives inside another engine."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from sinterlm.backends.gpu.simulator import Part, Simulator
from sinterlm.runtime.batch import StepBatch
from sinterlm.runtime.model import Model
from tests.gpu.host import PAGES, PROMPTS, Machine, batch


class BindArgs(ctypes.Structure):
    """``sl_bind_args`` of abi_device.h."""

    _fields_ = (("size", ctypes.c_uint32), ("stream", ctypes.c_void_p),
                ("workspace", ctypes.c_void_p), ("workspace_bytes", ctypes.c_uint64))  # fmt: skip


class EnqueueArgs(ctypes.Structure):
    """``sl_enqueue_args`` of abi_device.h."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("size",)),
        *((name, ctypes.c_int32) for name in ("num_tokens", "num_seqs", "num_sample_rows",
                                              "is_decode")),
        *((name, ctypes.c_void_p) for name in (
            "token_ids", "positions", "kv_slots", "page_table", "query_start", "context_lens",
            "sample_rows")),
        ("page_table_stride", ctypes.c_int32), ("page_tokens", ctypes.c_int32),
        ("page_stride", ctypes.c_int64), ("token_stride", ctypes.c_int32),
        ("head_stride", ctypes.c_int32), ("k_base", ctypes.c_void_p), ("v_base", ctypes.c_void_p),
        ("out_logits", ctypes.c_void_p), ("out_tokens", ctypes.c_void_p),
    )  # fmt: skip


class Caller:
    """A host with allocator, stream and KV tensors of its own: [K, V][page][token][head][D]."""

    def __init__(self, machine: Machine, model: Model, pages: int = 16) -> None:
        self.machine, self.model, self.driver = machine, model, machine.driver
        self.dll = ctypes.CDLL(str(machine.library))
        self.dll.sl_last_error.restype = ctypes.c_char_p
        self.stream = self.driver.stream()
        config = machine.tiny.graph.config
        self.heads, self.dim, self.layers = config.num_kv_heads, config.head_dim, config.num_layers
        half = pages * 16 * self.heads * self.dim * 2
        kv = [self.alloc(2 * half) for _ in range(self.layers)]
        self.k = (ctypes.c_void_p * self.layers)(*kv)
        self.v = (ctypes.c_void_p * self.layers)(*(base + half for base in kv))

    def alloc(self, size: int) -> int:
        return self.driver._block(self.driver.memory, size)

    def put(self, values: np.ndarray) -> int:
        address = self.alloc(max(values.nbytes, 16))
        self.driver.bytes_from(address)[: values.nbytes] = np.frombuffer(values, np.uint8)
        return address

    def bind(self, workspace: int = 0, size: int = 0) -> int:
        size = size or self.model.describe()["workspace_bytes"]
        args = BindArgs(ctypes.sizeof(BindArgs), self.stream, workspace or self.alloc(size), size)
        return int(self.dll.sl_bind(ctypes.c_void_p(self.model._handle), ctypes.byref(args)))

    def enqueue(self, step: StepBatch) -> tuple[int, int, int]:
        """(status, address of logits, of tokens)."""
        owner = np.repeat(np.arange(step.num_seqs), np.diff(step.query_start))
        page = step.page_table[owner, step.positions // 16]
        places = {"token_ids": step.token_ids, "positions": step.positions,
                  "kv_slots": (page * 16 + step.positions % 16).astype(np.int32),
                  "page_table": step.page_table, "query_start": step.query_start,
                  "context_lens": step.context_lens, "sample_rows": step.sample_rows}  # fmt: skip
        rows = len(step.sample_rows)
        padded = -(-self.machine.tiny.graph.config.vocab_size // 64) * 64
        logits, tokens = self.alloc(4 * rows * padded), self.alloc(4 * rows + 16)
        args = EnqueueArgs(
            size=ctypes.sizeof(EnqueueArgs), num_tokens=step.num_tokens, num_seqs=step.num_seqs,
            num_sample_rows=rows, is_decode=int(step.num_tokens == step.num_seqs),
            **{name: self.put(values) for name, values in places.items()},
            page_table_stride=step.page_table.shape[1], page_tokens=16,
            page_stride=16 * self.heads * self.dim, token_stride=self.heads * self.dim,
            head_stride=self.dim, k_base=ctypes.addressof(self.k), v_base=ctypes.addressof(self.v),
            out_logits=logits, out_tokens=tokens,
        )  # fmt: skip
        status = self.dll.sl_enqueue(ctypes.c_void_p(self.model._handle), ctypes.byref(args))
        return int(status), logits, tokens

    def read(self, address: int, dtype: type, count: int) -> np.ndarray:
        size = np.dtype(dtype).itemsize * count
        return self.driver.bytes_from(address, size)[:size].view(dtype).copy()


@pytest.fixture
def borrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open with SL_OPEN_BORROW."""
    from sinterlm.runtime import library

    monkeypatch.setattr(library, "OPEN_HUGE_PAGES", library.OPEN_HUGE_PAGES | 4)


@pytest.mark.slow
@pytest.mark.usefixtures("borrow")
def test_on_a_stream_and_in_memory_of_the_callers(machine: Machine) -> None:
    """Eagerly, then captured by the caller and replayed: the simulator's logits, and no call but
    launches."""
    simulator = Simulator(machine.table, machine.tiny.packed, machine.tiny.graph.config.rope)
    vocab = machine.tiny.graph.config.vocab_size
    with machine.open() as model:
        caller = Caller(machine, model)
        first = batch((0, 0, PROMPTS[0]), (1, 0, PROMPTS[1]))
        assert caller.enqueue(first)[0] != 0, "a step without sl_bind"
        assert caller.bind() == 0
        status, logits, tokens = caller.enqueue(first)
        assert status == 0
        want = simulator.step(*(Part(PAGES[s], 0, PROMPTS[s], slot=s) for s in (0, 1)))
        found = caller.read(logits, np.float32, 2 * 192).reshape(2, -1)[:, :vocab]
        assert np.array_equal(found, want.logits)
        ids = caller.read(tokens, np.int32, 2)
        assert ids.tolist() == want.ids.tolist()

        decode = batch((0, 7, ids[:1].tolist()), (1, 1, ids[1:].tolist()))
        machine.driver.on_capture_begin(caller.stream, 1)
        before = len(machine.driver.calls)
        status, logits, tokens = caller.enqueue(decode)
        graph = machine.driver._handle(machine.driver.capturing.pop(caller.stream))
        assert status == 0
        assert set(machine.driver.calls[before:]) <= {"launch", "set_device", "set_context"}
        machine.driver.on_graph_launch(graph, caller.stream)
        want = simulator.step(Part(PAGES[0], 7, [-1], slot=0), Part(PAGES[1], 1, [-1], slot=1))
        assert caller.read(tokens, np.int32, 2).tolist() == want.ids.tolist()
        found = caller.read(logits, np.float32, 2 * 192).reshape(2, -1)[:, :vocab]
        assert np.array_equal(found, want.logits)
        assert caller.bind(size=64) != 0
        assert b"workspace_bytes is 64" in caller.dll.sl_last_error()
    assert machine.driver.faults == []
