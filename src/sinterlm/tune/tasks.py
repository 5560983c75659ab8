"""What the search, the choice and the timer know of what is tuned: a task has cuts, a cut is a
kernel, and a kernel is timed as a table of one launch. ``gemm.py`` and ``attention.py`` say what
these are, ``catalogue.py`` which ones a model has.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import log2
from typing import Any, Protocol, TypeVar

from sinterlm.backends.gpu.signatures import SIGNATURES
from sinterlm.backends.gpu.table import Kernel, Table
from sinterlm.backends.gpu.tuning import Entry, TileTable
from sinterlm.runtime.device_probe import Output, Step, Train

#: Bytes that launches rotate through, so that no last-level cache (256 MB on the largest of our
#: devices) holds what the next one reads; and most copies, which only tiny models reach.
ROTATED_BYTES, MOST_COPIES = 512 << 20, 256
LEAST_LAUNCHES, SAMPLES, WARMUP_US = 16, 9, 50_000.0
_ALIGN = 256

AnyCut = TypeVar("AnyCut", bound="Cut")


@dataclass(frozen=True)
class Cut:
    """How a kernel is cut, and the compiler's options that go with it."""

    num_warps: int
    num_stages: int
    waves_per_eu: int  #: 0 = the compiler's choice, and where there is no such option

    @classmethod
    def of(cls: type[AnyCut], kernel: Kernel) -> AnyCut:
        """That of a compiled kernel."""
        held = {"SPLIT": 1, "waves_per_eu": 0, **kernel.constants, **kernel.options}
        return cls(**{field.name: held[field.name] for field in fields(cls)})

    @property
    def width(self) -> int:
        """Columns of a tile, where they matter to whoever reads what is left; else 0."""
        return 0

    def options(self, before: dict[str, Any]) -> dict[str, Any]:
        """``before`` with this cut's, as far as the compiler has them."""
        held = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if "waves_per_eu" in before:
            held["waves_per_eu"] = self.waves_per_eu
        return {**before, **held}

    def steps_to(self, other: Cut) -> float:
        """How many times something would be doubled or halved; a stage counts as one step."""
        total = float(abs(self.num_stages - other.num_stages))
        total += abs(self.waves_per_eu - other.waves_per_eu) / 2
        for field in fields(self):
            if field.name not in ("num_stages", "waves_per_eu"):
                total += abs(log2(getattr(self, field.name) / getattr(other, field.name)))
        return total


@dataclass(frozen=True)
class Trial:
    """One candidate: a table of one launch, the steps that it is timed in, and how."""

    table: Table
    steps: tuple[tuple[Step, Train], ...] = ()
    task: str = ""  #: candidates of one task leave the same numbers but for rounding
    outputs: tuple[Output, ...] = ()  #: of the last step, with their bytes per row
    checked_rows: int = 64  #: of them, at most
    pages: int = 0  #: of noise; at least what a step needs


class Task(Protocol):
    """One kernel of a slot, to be chosen for all steps that it serves."""

    @property
    def name(self) -> str:
        """For people and the journal."""
        ...

    @property
    def target(self) -> str:
        """The device's name."""
        ...

    @property
    def start(self) -> Kernel:
        """What compiling takes untuned."""
        ...

    @property
    def steps(self) -> tuple[Step, ...]:
        """That it is timed in, the largest last."""
        ...

    @property
    def num_joined(self) -> int:
        """Kernels of the slot that must have one ``Cut.width``; 0 = each may have its own."""
        ...

    def label(self, step: Step) -> str:
        """What a step is called in journal and table."""
        ...

    def nbytes(self, step: Step) -> int:
        """Bytes of weights, or of keys and values, that a step reads; 0 = arithmetic decides."""
        ...

    def cuts(self) -> list[Cut]:
        """Every legal cut, that of ``start`` first. What is left out could not compile or would be
        refused then; the gates of ``backends.gpu.objects`` judge every object."""
        ...

    def cut_of(self, kernel: Kernel) -> Cut:
        """How a kernel of this task is cut."""
        ...

    def kernel_of(self, cut: Cut) -> Kernel | None:
        """The kernel that compiling makes of ``cut``; None where the op needs another one."""
        ...

    def entry(self, kernel: Kernel, source: str, **measured: Any) -> Entry:
        """The entry of a tile table that gives ``kernel``, and for nothing else."""
        ...

    def trial(self, kernel: Kernel) -> Trial:
        """``kernel`` alone."""
        ...


def copies_of(nbytes: int) -> int:
    """Copies of ``nbytes`` that launches rotate through."""
    return min(MOST_COPIES, -(-ROTATED_BYTES // nbytes))


def train(copies: int, copy_bytes: int) -> Train:
    """So many launches that every copy is read."""
    return Train(copies, copy_bytes, max(copies, LEAST_LAUNCHES), SAMPLES, WARMUP_US)


def outputs_of(table: Table, kernel: str, names: tuple[str, ...]) -> tuple[Output, ...]:
    """The buffers ``names`` that ``kernel`` writes."""
    kinds = SIGNATURES[kernel].args
    return tuple(
        (f"buffer:{b.name}", kinds[b.name], b.nbytes) for b in table.buffers if b.name in names
    )


def aligned(nbytes: int) -> int:
    """Rounded up to what tensors are aligned to."""
    return -(-nbytes // _ALIGN) * _ALIGN


def nothing(tiles: TileTable) -> Trial:
    """A table without launches: opening it tells which device is there."""
    facts = {"layers": 1, "hidden": 64, "heads": 1, "kv_heads": 1, "head_dim": 32, "vocab": 64,
             "kv_bytes": 2, "max_seqs": 1, "warp": 32, "layout_hash": 0,
             "weights_bytes": _ALIGN}  # fmt: skip
    return Trial(Table(tiles.target, facts, (), (), (), ()))
