"""A GPU library on a stream and in memory of its caller's, as it lives inside another engine."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest

from sinterlm.backends.gpu.simulator import Part, Simulator
from sinterlm.errors import RuntimeFault, UsageError
from sinterlm.runtime.batch import StepBatch
from sinterlm.runtime.device import (
    BindArgs,
    DeviceModel,
    DeviceStep,
    EnqueueArgs,
    EnqueueHeadArgs,
    PagedTensors,
)
from sinterlm.runtime.opening import StepSizes
from tests.gpu.host import PAGES, PROMPTS, Machine, batch

SIZES = StepSizes(max_tokens=16, max_seqs=8, max_sample_rows=8, max_model_len=64)


class Caller:
    """A host with allocator, stream and KV tensors of its own: [K, V][page][token][head][D]."""

    def __init__(
        self, machine: Machine, pages: int = 16, *, own_weights: bool = True,
        sizes: StepSizes = SIZES,
    ) -> None:  # fmt: skip
        self.machine, self.driver = machine, machine.driver
        self.stream = self.driver.stream()
        weights = self.put(machine.tiny.packed) if own_weights else None
        self.model = DeviceModel(machine.bundle(), sizes, weights)
        config = machine.tiny.graph.config
        heads, dim, layers = config.num_kv_heads, config.head_dim, config.num_layers
        half = pages * 16 * heads * dim * 2
        kv = [self.alloc(2 * half) for _ in range(layers)]
        self.kv = PagedTensors(
            tuple(kv), tuple(base + half for base in kv), 16, 16 * heads * dim, heads * dim, dim
        )
        self.vocab, self.padded = config.vocab_size, -(-config.vocab_size // 64) * 64
        self.hidden_size = config.hidden_size

    def alloc(self, size: int) -> int:
        return self.driver._block(self.driver.memory, size)

    def put(self, values: np.ndarray) -> int:
        address = self.alloc(max(values.nbytes, 16))
        self.driver.bytes_from(address)[: values.nbytes] = np.frombuffer(values, np.uint8)
        return address

    def bind(self) -> None:
        self.model.bind(self.stream, self.alloc(self.model.workspace_bytes))
        self.model.use_kv(self.kv)

    def step(self, step: StepBatch, padding: int = 0) -> DeviceStep:
        """``step`` on the device, with ``padding`` more rows and sequences, as graphs have them."""
        owner = np.repeat(np.arange(step.num_seqs), np.diff(step.query_start))
        page = step.page_table[owner, step.positions // 16]
        slots = (page * 16 + step.positions % 16).astype(np.int32)
        places = {
            "token_ids": (step.token_ids, 0), "positions": (step.positions, 0),
            "kv_slots": (slots, -1), "query_start": (step.query_start, step.num_tokens),
            "context_lens": (step.context_lens, 0),
        }  # fmt: skip
        padded = {
            name: self.put(np.append(values, np.full(padding, fill, np.int32)))
            for name, (values, fill) in places.items()
        }
        table = np.pad(step.page_table, ((0, padding), (0, 0)))
        return DeviceStep(
            num_tokens=step.num_tokens + padding, num_seqs=step.num_seqs + padding,
            is_decode=step.num_tokens == step.num_seqs, page_table=self.put(table),
            page_table_stride=table.shape[1], **padded,
        )  # fmt: skip

    def read(self, address: int, dtype: type, *shape: int) -> np.ndarray:
        size = np.dtype(dtype).itemsize * int(np.prod(shape))
        return self.driver.bytes_from(address, size)[:size].view(dtype).reshape(shape).copy()


@pytest.mark.slow
@pytest.mark.parametrize("own_weights", [True, False])
def test_hidden_states_and_logits_on_a_stream_of_the_callers(
    machine: Machine, own_weights: bool
) -> None:
    """Eagerly, then a padded decode captured by the caller and replayed, in rows of a wider tensor:
    the simulator's bits, and no call but launches."""
    simulator = Simulator(machine.table, machine.tiny.packed, machine.tiny.graph.config.rope)
    caller = Caller(machine, own_weights=own_weights)
    model, driver, width = caller.model, machine.driver, caller.hidden_size
    with model:
        first = caller.step(batch((0, 0, PROMPTS[0]), (1, 0, PROMPTS[1])))
        hidden = caller.alloc(2 * 16 * width)
        with pytest.raises(UsageError, match="use_kv"):
            model.enqueue(first, caller.stream, hidden, width)
        model.use_kv(caller.kv)
        with pytest.raises(RuntimeFault, match="sl_bind comes before the first step"):
            model.enqueue(first, caller.stream, hidden, width)
        caller.bind()
        model.enqueue(first, caller.stream, hidden, width)
        want = simulator.step(*(Part(PAGES[s], 0, PROMPTS[s], slot=s) for s in (0, 1)), hidden=True)
        found = caller.read(hidden, np.uint16, 8, width)
        assert np.array_equal(found, want.hidden)

        rows = caller.put(found[[6, 7]])
        logits = caller.alloc(4 * 2 * caller.padded)
        model.enqueue_head(rows, 2, caller.stream, logits)
        drawn = simulator.head(want.hidden[[6, 7]])
        found = caller.read(logits, np.float32, 2, caller.padded)[:, : caller.vocab]
        assert np.array_equal(found, drawn.logits)
        ids = found.argmax(1).tolist()
        assert ids == drawn.ids.tolist()

        decode = caller.step(batch((0, 7, ids[:1]), (1, 1, ids[1:])), padding=2)
        wide = caller.alloc(2 * 4 * (width + 16))
        other = driver.stream()
        driver.on_capture_begin(other, 1)
        before = len(driver.calls)
        model.enqueue(decode, other, wide, width + 16)
        graph = driver._handle(driver.capturing.pop(other))
        assert set(driver.calls[before:]) <= {"launch", "set_device", "set_context"}
        driver.on_graph_launch(graph, other)
        want = simulator.step(Part(PAGES[0], 7, ids[:1], slot=0),
                              Part(PAGES[1], 1, ids[1:], slot=1), hidden=True)  # fmt: skip
        found = caller.read(wide, np.uint16, 4, width + 16)
        assert np.array_equal(found[:2, :width], want.hidden)
        assert (found[:, width:] == 0xFFFF).all(), "something between the rows was written"
    assert driver.faults == []


def test_what_is_wrong_is_said(machine: Machine) -> None:
    machine.driver.run = lambda launched: None
    caller = Caller(machine)
    width, stream = caller.hidden_size, caller.stream
    caller.bind()
    step, out = caller.step(batch((0, 0, [5, 17]))), caller.alloc(4096)
    refused = [
        ((replace(step, num_tokens=17), stream, out, width), r"num_tokens is 17"),
        ((replace(step, is_decode=True), stream, out, width), "is_decode with 2 tokens of 1"),
        ((step, stream, out, width - 16), r"hidden_stride is 48 and must be in \[64,"),
        ((step, stream, out, 1 << 30), "hidden_stride is"),
        ((step, stream, out, width + 8), "hidden_stride is 72 and must be a multiple of 16"),
        ((step, stream, out + 8, width), "out_hidden is at .* not aligned to 16 bytes"),
    ]
    for args, told in refused:
        with pytest.raises(RuntimeFault, match=told):
            caller.model.enqueue(*args)
    far = replace(caller.kv, head_stride=1 << 30)
    caller.model.use_kv(far)
    with pytest.raises(RuntimeFault, match="lead 2147484672 elements into a page"):
        caller.model.enqueue(step, stream, out, width)
    caller.model.use_kv(caller.kv)
    for args, told in (((out, 9, stream, out), "num_rows is 9"), ((0, 1, stream, out), "hidden"),
                       ((out + 2, 1, stream, out), "hidden is at")):  # fmt: skip
        with pytest.raises(RuntimeFault, match=told):
            caller.model.enqueue_head(*args)
    with pytest.raises(RuntimeFault, match="not aligned to 256 bytes"):
        caller.model.bind(stream, caller.alloc(caller.model.workspace_bytes + 256) + 16)
    with pytest.raises(UsageError, match="addresses of 1 and 1 layers"):
        caller.model.use_kv(replace(caller.kv, k=(1,), v=(1,)))
    args = BindArgs(ctypes.sizeof(BindArgs), stream, out, 64)
    with pytest.raises(RuntimeFault, match="workspace_bytes is 64 and must be"):
        caller.model._library.call("sl_bind", caller.model._handle, ctypes.byref(args))
    caller.model.close()
    with pytest.raises(UsageError, match="closed"):
        caller.model.enqueue(step, stream, out, width)
    assert machine.driver.faults == []


@pytest.mark.slow
def test_greedy_tokens_and_logits_of_one_call(machine: Machine) -> None:
    """What ``DeviceModel`` leaves out of the interface: ids drawn on the device, of steps and of
    heads."""
    simulator = Simulator(machine.table, machine.tiny.packed, machine.tiny.graph.config.rope)
    caller = Caller(machine)
    caller.bind()
    model, kv = caller.model, caller.kv
    step = batch((0, 0, PROMPTS[0]), (1, 0, PROMPTS[1]))
    given = vars(caller.step(step))
    k, v = ((ctypes.c_void_p * len(kv.k))(*of) for of in (kv.k, kv.v))
    logits, ids, hidden = caller.alloc(8 * caller.padded), caller.alloc(16), caller.alloc(4096)
    args = EnqueueArgs(
        size=ctypes.sizeof(EnqueueArgs), stream=caller.stream, num_sample_rows=2, page_tokens=16,
        page_stride=kv.page_stride, token_stride=kv.token_stride, head_stride=kv.head_stride,
        k_base=ctypes.addressof(k), v_base=ctypes.addressof(v), out_logits=logits, out_tokens=ids,
        out_hidden=hidden, hidden_stride=caller.hidden_size, **given,
        sample_rows=caller.put(step.sample_rows),
    )  # fmt: skip
    model._library.call("sl_enqueue", model._handle, ctypes.byref(args))
    want = simulator.step(*(Part(PAGES[s], 0, PROMPTS[s], slot=s) for s in (0, 1)), hidden=True)
    found = caller.read(logits, np.float32, 2, caller.padded)[:, : caller.vocab]
    assert np.array_equal(found, want.logits)
    assert caller.read(ids, np.int32, 2).tolist() == want.ids.tolist()
    head = EnqueueHeadArgs(
        ctypes.sizeof(EnqueueHeadArgs), caller.stream, 2, caller.put(want.hidden[[6, 7]]), logits,
        ids,
    )  # fmt: skip
    model._library.call("sl_enqueue_head", model._handle, ctypes.byref(head))
    drawn = simulator.head(want.hidden[[6, 7]])
    assert caller.read(ids, np.int32, 2).tolist() == drawn.ids.tolist()
    assert machine.driver.faults == []
