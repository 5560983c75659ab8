"""This process's place among vLLM's tensor-parallel ranks, and its way to the others."""

from __future__ import annotations

import torch
from vllm.distributed.parallel_state import get_tp_group

from sinterlm.runtime.batch import Float32
from sinterlm.runtime.ranks import RankLink


def tensor_parallel_rank() -> int:
    """0 where there is one rank."""
    return int(get_tp_group().rank_in_group)


def agree(reason: str | None) -> str | None:
    """The first rank's reason for leaving the model to vLLM; None where no rank has one.

    All ranks run our class or all run vLLM's, whose sums are others: one that waits for a sum that
    nobody else makes would wait for ever. Every rank has to call this.
    """
    group = get_tp_group()
    if group.world_size == 1:
        return reason
    told: list[str | None] = [None] * group.world_size
    torch.distributed.all_gather_object(told, reason, group=group.cpu_group)
    return next((f"{text} (rank {rank})" for rank, text in enumerate(told) if text), None)


def open_link() -> RankLink | None:
    """A link that sums through vLLM's own group, shared memory or gloo; None for one rank."""
    group = get_tp_group()
    if group.world_size == 1:
        return None

    def all_reduce(data: Float32) -> None:
        ours = torch.from_numpy(data)
        summed = group.all_reduce(ours)
        if summed.data_ptr() != ours.data_ptr():
            ours.copy_(summed)

    return RankLink(group.rank_in_group, all_reduce)
