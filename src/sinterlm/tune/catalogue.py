"""What of a model there is to tune."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sinterlm.backends.gpu.devices import Device
from sinterlm.backends.gpu.tuning import TileTable
from sinterlm.errors import UsageError
from sinterlm.ir import ops
from sinterlm.ir.plan import Plan
from sinterlm.tune.attention import AttentionTask, attention_tasks
from sinterlm.tune.gemm import GemmTask, gemm_tasks

AnyTask = GemmTask | AttentionTask

_GEMMS = (ops.NormQkvRopeKv | ops.OResidual | ops.NormGateUpAct | ops.DownResidual
          | ops.NormLmHeadSample)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Of the steps that are timed."""

    #: Rows of GEMMs, and sequences of decoding rows as far as a step may have them.
    batch: tuple[int, ...] = (1, 16, 64, 512)
    contexts: tuple[int, ...] = (2048, 8192)  #: keys of each decoding row
    prompts: tuple[int, ...] = (512, 2048)  #: tokens of a prompt, for attention

    def check(self) -> None:
        """Raises UsageError where one is none."""
        for flag, values in (("--batch-sizes", self.batch), ("--context-lens", self.contexts),
                             ("--prompt-lens", self.prompts)):  # fmt: skip
            if not values or min(values) < 1:
                raise UsageError(f"{flag} {','.join(map(str, values))} must be at least 1 each")


def tasks_of(
    plan: Plan, device: Device, tiles: TileTable, wanted: Sequence[str], sizes: Sizes
) -> list[AnyTask]:  # fmt: skip
    """The tasks of a model, in the order of a step. ``wanted`` are ops or slots (none = all).
    Raises UsageError for an op that the model has not, and for sizes that are none."""
    sizes.check()
    found = list(_all_tasks(plan, device, tiles, sizes))
    names = dict.fromkeys(name for t in found for name in (t.slot.partition(".")[0], t.slot))
    for name in wanted:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(names)}"
            raise UsageError(f"--ops {name}: the model has no such op to tune; {hint}")
    return [t for t in found if not wanted or {t.slot, t.slot.partition(".")[0]} & set(wanted)]


def _all_tasks(
    plan: Plan, device: Device, tiles: TileTable, sizes: Sizes
) -> Iterator[AnyTask]:  # fmt: skip
    """Of layers that share a slot the first one's."""
    batch, contexts, prompts = (sorted(set(v)) for v in (sizes.batch, sizes.contexts,
                                                         sizes.prompts))  # fmt: skip
    seen: set[str] = set()
    for op in plan.graph.ops:
        alone = replace(plan, graph=replace(plan.graph, ops=(op,)))
        made: list[AnyTask]
        if isinstance(op, _GEMMS):
            made = list(gemm_tasks(alone, device, tiles, batch))
        elif isinstance(op, ops.Attention):
            made = list(attention_tasks(alone, device, tiles, batch, contexts, prompts))
        else:
            continue
        if made and made[0].slot not in seen:
            seen.add(made[0].slot)
            yield from made
