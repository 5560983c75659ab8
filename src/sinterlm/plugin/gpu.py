"""GpuModel: our GPU library on the tensors of vLLM's step, on torch's stream and in its memory.

A step is enqueued: nothing here waits, and what a step needs is held from the beginning, so vLLM
may capture it. Steps that vLLM replays from a graph of its own do not come through here. torch is
reached through a ``DeviceMemory`` alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from sinterlm.artifact.bundle import Bundle
from sinterlm.artifact.manifest import ModelShape
from sinterlm.plugin.counters import open_counters
from sinterlm.runtime.device import ALIGNMENT, DeviceModel, DeviceStep, PagedTensors
from sinterlm.runtime.opening import StepSizes

ElementName = Literal["uint8", "int32", "bfloat16", "float32"]
_BF16_BYTES, _FP32_BYTES, _INT32_BYTES = 2, 4, 4
_PANEL = 64  #: logits have rows of so many columns
_INT32_MAX = (1 << 31) - 1


class DeviceMemory(Protocol):
    """A device's allocator and stream; tensors are torch's, or have the same few methods."""

    def empty(self, shape: tuple[int, ...], dtype: ElementName) -> Any:
        """A tensor of anything."""

    def zeros(self, shape: tuple[int, ...], dtype: ElementName) -> Any:
        """A tensor of zeros."""

    def read_file(self, path: Path, to: Any) -> None:
        """Copy a file's bytes into a tensor of as many bytes."""

    def stream(self) -> int:
        """The handle of the stream that work is enqueued on now."""


class GpuModel:
    """A bundle opened on this process's device."""

    def __init__(self, bundle: Bundle, config: Any, memory: DeviceMemory) -> None:
        """Bring the weights to the device and open for the sizes of ``config``, a VllmConfig.
        Raises BundleError, ResourceError, RuntimeFault."""
        scheduler = config.scheduler_config
        tokens, seqs = scheduler.max_num_batched_tokens, scheduler.max_num_seqs
        self.shape = bundle.manifest.shape
        self.dtype, self.isa = bundle.manifest.dtype, bundle.manifest.isa
        self.attention_scale = bundle.manifest.constants.attention_scale
        self._memory = memory
        self._max_rows = seqs
        weights = None
        if bundle.weights_path is not None:  # else the model refuses
            self._weights = _aligned(memory, bundle.weights_path.stat().st_size)
            memory.read_file(bundle.weights_path, self._weights)
            weights = self._weights.data_ptr()
        sizes = StepSizes(tokens, seqs, seqs, config.model_config.max_model_len)
        self._model = DeviceModel(bundle, sizes, weights)
        self._workspace = _aligned(memory, self._model.workspace_bytes)
        self._model.bind(memory.stream(), self._workspace.data_ptr())
        # What vLLM has in 64 bits.
        self._narrow = {
            name: memory.empty((tokens,), "int32") for name in ("ids", "positions", "slots")
        }
        self._counters = open_counters()
        self._bound: int | None = None  # address of the first layer's pages

    def close(self) -> None:
        """Give everything on the device back but what torch keeps."""
        self._model.close()

    def blank(self, tokens: int) -> Any:
        """Hidden states of a step that is not run: zeros [tokens, H] bf16."""
        return self._memory.zeros((tokens, self.shape.hidden_size), "bfloat16")

    def hidden(self, ids: Any, positions: Any, metadata: Any, pages: Sequence[Any]) -> Any:
        """Enqueue a step; its final-normed hidden states [T, H] bf16, T of them as ``ids`` has.

        ``metadata`` is that of vLLM's Triton attention, ``pages`` the KV tensor of every layer.
        Rows beyond the metadata's tokens are zeros; within them, rows whose slot is -1 hold
        anything. Raises RuntimeError for tensors that are not known, RuntimeFault where the library
        refuses.
        """
        start = time.perf_counter_ns()
        self._use(pages)
        tokens, seqs = metadata.num_actual_tokens, len(metadata.seq_lens)
        width = self.shape.hidden_size
        make = self._memory.empty if len(ids) == tokens else self._memory.zeros
        out = make((len(ids), width), "bfloat16")
        table = metadata.block_table
        step = DeviceStep(
            num_tokens=tokens,
            num_seqs=seqs,
            is_decode=metadata.max_query_len == 1 and tokens == seqs,
            token_ids=self._int32("ids", ids, tokens),
            positions=self._int32("positions", positions, tokens),
            kv_slots=self._int32("slots", metadata.slot_mapping, tokens),
            page_table=_address("block_table", table, seqs),
            query_start=_address("query_start_loc", metadata.query_start_loc, seqs + 1),
            context_lens=_address("seq_lens", metadata.seq_lens, seqs),
            page_table_stride=table.stride()[0],
        )
        self._model.enqueue(step, self._memory.stream(), out.data_ptr(), width)
        self._counters.add(1, tokens, time.perf_counter_ns() - start)
        return out

    def logits(self, hidden: Any) -> Any:
        """Enqueue the head; logits [R, V] float32 of rows [R, H] that ``hidden`` gave."""
        start = time.perf_counter_ns()
        rows, width = len(hidden), self.shape.hidden_size
        hidden = hidden.contiguous()
        if tuple(hidden.shape) != (rows, width) or hidden.element_size() != _BF16_BYTES:
            raise RuntimeError(
                f"hidden states have shape {tuple(hidden.shape)} and dtype {hidden.dtype}, and "
                f"SinterLM gave [rows, {width}] in bfloat16; set SINTERLM_VLLM=off"
            )
        pitch = -(-self.shape.vocab_size // _PANEL) * _PANEL
        out = self._memory.empty((rows, pitch), "float32")
        for first in range(0, rows, self._max_rows):
            count = min(self._max_rows, rows - first)
            self._model.enqueue_head(
                hidden.data_ptr() + first * width * _BF16_BYTES, count, self._memory.stream(),
                out.data_ptr() + first * pitch * _FP32_BYTES,
            )  # fmt: skip
        self._counters.add(0, 0, time.perf_counter_ns() - start)
        return out[:, : self.shape.vocab_size]

    def _use(self, pages: Sequence[Any]) -> None:
        """Keep keys and values in vLLM's tensors, which may be made anew after profiling."""
        address = pages[0].data_ptr()
        if address != self._bound:
            self._model.use_kv(paged_tensors(pages, self.shape))
            self._bound = address

    def _int32(self, name: str, tensor: Any, count: int) -> int:
        """Address of the first ``count`` numbers in 32 bits: as they are, or narrowed."""
        if len(tensor) < count:
            raise RuntimeError(f"{name} has {len(tensor)} entries, of {count} tokens")
        if tensor.element_size() == _INT32_BYTES:
            return _address(name, tensor, count)
        narrow = self._narrow[name][:count]
        narrow.copy_(tensor[:count])
        return int(narrow.data_ptr())


def paged_tensors(pages: Sequence[Any], shape: ModelShape) -> PagedTensors:
    """How our kernels walk the KV tensor of every layer: [blocks, KV heads, block size, 2 D],
    [blocks, 2, block size, KV heads, D] or [2, blocks, block size, KV heads, D], in any order of
    memory. Raises RuntimeError for another."""
    heads, dim = shape.num_kv_heads, shape.head_dim
    sizes, strides = tuple(pages[0].shape), tuple(pages[0].stride())
    found = None
    if len(sizes) == 4 and (sizes[1], sizes[3]) == (heads, 2 * dim):
        found = (sizes[0], sizes[2]), (strides[0], strides[2], strides[1]), dim
    elif len(sizes) == 5 and sizes[3:] == (heads, dim) and (sizes[0] == 2) != (sizes[1] == 2):
        k_or_v, block = (0, 1) if sizes[0] == 2 else (1, 0)
        found = (sizes[block], sizes[2]), (strides[block], strides[2], strides[3]), strides[k_or_v]
    is_same = all((tuple(p.shape), tuple(p.stride())) == (sizes, strides) for p in pages)
    if found is None or not is_same or strides[-1] != 1 or pages[0].element_size() != _BF16_BYTES:
        raise RuntimeError(
            f"vLLM's KV tensors have shape {sizes}, strides {strides} and dtype {pages[0].dtype}, "
            "which SinterLM does not know; set SINTERLM_VLLM=off"
        )
    (blocks, block_size), (page_stride, token_stride, head_stride), to_v = found
    # Kernels have slots, and the place of a token and head within a page, in 32 bits.
    within = block_size * token_stride + heads * head_stride
    if max(blocks * block_size, within) > _INT32_MAX:
        raise RuntimeError(
            f"vLLM's KV tensors of shape {sizes} and strides {strides} are too large for 32-bit "
            "offsets; lower --gpu-memory-utilization or set SINTERLM_VLLM=off"
        )
    k = tuple(p.data_ptr() for p in pages)
    v = tuple(address + to_v * _BF16_BYTES for address in k)
    return PagedTensors(k, v, block_size, page_stride, token_stride, head_stride)


def _aligned(memory: DeviceMemory, nbytes: int) -> Any:
    """So many bytes, aligned as the library wants them."""
    whole = memory.empty((nbytes + ALIGNMENT,), "uint8")
    at = -whole.data_ptr() % ALIGNMENT
    return whole[at : at + nbytes]


def _address(name: str, tensor: Any, rows: int) -> int:
    """Where a tensor of at least ``rows`` rows of int32 begins."""
    if len(tensor) < rows or tensor.element_size() != _INT32_BYTES or tensor.stride()[-1] != 1:
        raise RuntimeError(
            f"vLLM's {name} has shape {tuple(tensor.shape)}, strides {tuple(tensor.stride())} and "
            f"dtype {tensor.dtype}, and SinterLM reads {rows} rows of int32; set SINTERLM_VLLM=off"
        )
    return int(tensor.data_ptr())
