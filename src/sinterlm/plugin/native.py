"""NativeModel: our library on the arrays of vLLM's step: ids, positions, block table, KV tensors.

vLLM's CPU pages are [blocks, KV heads, block size, 2 * head size]; a head's block is one page of
ours (``abi.h``), K and then V in panels. Nobody but us reads or writes inside a page.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sinterlm.artifact.bundle import Bundle
from sinterlm.artifact.manifest import kv_head_bytes
from sinterlm.plugin.counters import open_counters
from sinterlm.runtime.batch import Int32, StepBatch
from sinterlm.runtime.model import KvMemory, Model
from sinterlm.runtime.ranks import RankLink

_NO_ROWS: Int32 = np.empty(0, np.int32)


class NativeModel:
    """A bundle opened in this process."""

    def __init__(
        self, bundle: Bundle, config: Any, cpu_ids: tuple[int, ...], link: RankLink | None = None
    ) -> None:
        """Open for the sizes of ``config``, a VllmConfig; worker i runs on ``cpu_ids[i]``, ``link``
        leads to the other ranks of a bundle that is a part."""
        scheduler = config.scheduler_config
        self.shape = bundle.manifest.shape
        self.dtype, self.isa = bundle.manifest.dtype, bundle.manifest.isa
        self._model = Model(
            bundle,
            num_threads=len(cpu_ids),
            cpu_ids=cpu_ids,
            max_tokens=scheduler.max_num_batched_tokens,
            max_seqs=scheduler.max_num_seqs,
            max_sample_rows=scheduler.max_num_seqs,
            max_model_len=config.model_config.max_model_len,
            link=link,
        )
        # All ranks take the same steps; the counters are one writer's.
        self._counters = open_counters(is_writer=link is None or link.rank == 0)
        self._bound: int | None = None  # address of the first layer's pages

    def close(self) -> None:
        """Stop the workers and give all memory back."""
        self._model.close()

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied with."""
        return self._model.manifest.constants.attention_scale

    def blank(self, tokens: int) -> torch.Tensor:
        """Hidden states of a step that is not run: zeros [tokens, H]."""
        return torch.zeros(tokens, self.shape.hidden_size)

    def hidden(
        self, ids: torch.Tensor, positions: torch.Tensor, metadata: Any,
        pages: Sequence[torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        """Final-normed hidden states [T, H] float32 of a step; rows of padding are zeros.

        ``metadata`` is that of vLLM's CPU attention, ``pages`` the KV tensor of every layer. Raises
        RuntimeFault where the library refuses.
        """
        start = time.perf_counter_ns()
        self._bind(pages)
        tokens = metadata.num_actual_tokens
        out = torch.zeros(len(ids), self.shape.hidden_size, dtype=torch.float32)
        batch = StepBatch(
            token_ids=_int32(ids[:tokens]),
            positions=_int32(positions[:tokens]),
            query_start=_int32(metadata.query_start_loc),
            context_lens=_int32(metadata.seq_lens),
            page_table=_int32(metadata.block_table),
            sample_rows=_NO_ROWS,
        )
        self._model.hidden(batch, out[:tokens].numpy())
        self._counters.add(1, tokens, time.perf_counter_ns() - start)
        return out

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] float32 of rows that ``hidden`` gave."""
        start = time.perf_counter_ns()
        logits = torch.from_numpy(self._model.head(hidden.numpy()))
        self._counters.add(0, 0, time.perf_counter_ns() - start)
        return logits

    def _bind(self, pages: Sequence[torch.Tensor]) -> None:
        """Use vLLM's KV tensors, which may be made anew after profiling."""
        address = pages[0].data_ptr()
        if address == self._bound:
            return
        blocks, heads, block_size, width = pages[0].shape
        expected = (self.shape.num_kv_heads, 2 * self.shape.head_dim)
        strides = pages[0].stride()
        is_known = (heads, width) == expected and strides[1:] == (block_size * width, width, 1)
        half = kv_head_bytes(self.shape.head_dim, self._model.manifest.kv_cache_dtype)
        if not is_known or pages[0].element_size() * self.shape.head_dim != half:
            raise RuntimeError(
                f"vLLM's KV tensors have shape {tuple(pages[0].shape)}, strides {strides} and "
                f"dtype {pages[0].dtype}, which SinterLM does not know; set SINTERLM_VLLM=off"
            )
        self._model.bind_kv(
            KvMemory(
                addresses=tuple(layer.data_ptr() for layer in pages),
                num_pages=blocks,
                page_tokens=block_size,
                page_stride=strides[0],
                head_stride=strides[1],
            )
        )
        self._bound = address


def _int32(tensor: torch.Tensor) -> Int32:
    return np.ascontiguousarray(tensor.numpy(), np.int32)
