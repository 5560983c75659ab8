"""What there is to tune: every GEMM of a model's launch table for each number of rows that has a
kernel of its own; and one candidate for it as a table of one launch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from sinterlm.backends.gpu.devices import Device
from sinterlm.backends.gpu.launch import MAX_SEQS, launch_table, made_for
from sinterlm.backends.gpu.operands import operand
from sinterlm.backends.gpu.signatures import SIGNATURES
from sinterlm.backends.gpu.table import LEFT_OUT, Choice, Kernel, Launch, Table
from sinterlm.backends.gpu.tuning import Entry, Stored, TileTable
from sinterlm.errors import UsageError
from sinterlm.ir import ops
from sinterlm.ir.plan import PackedTensor, Plan
from sinterlm.runtime.device_probe import Output, Train

#: Bytes of weights that launches rotate through, so that no last-level cache (256 MB on the largest
#: of our devices) holds what the next one reads; and most copies, which only tiny matrices reach.
ROTATED_BYTES, MOST_COPIES = 512 << 20, 256
_LEAST_LAUNCHES, _SAMPLES, WARMUP_US = 16, 9, 50_000.0
_ALIGN = 256
#: Kernels that compute two blocks of columns at once.
_PAIRS = ("norm_qkv_rope_kv", "norm_gate_up_act")
#: What kernels write that is looked at. Keys and values go through the same sums as queries.
_WRITTEN = {"norm_qkv_rope_kv": ("q",), "residual_matmul": ("x", "xw", "ssq"),
            "norm_gate_up_act": ("h",), "lm_head": ("logits",)}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One candidate: a table of one launch, and how it is timed."""

    table: Table
    train: Train
    task: str = ""  #: candidates of one task leave the same numbers but for rounding
    outputs: tuple[Output, ...] = ()  #: these, their bytes per row


@dataclass(frozen=True)
class Task:
    """One GEMM in steps of at most ``max_rows`` rows (0 = any number)."""

    slot: str  #: as the launch table calls it
    max_rows: int
    rows: tuple[int, ...]  #: that it is timed at, ascending
    start: Kernel  #: what compiling takes untuned
    num_kernels: int  #: of the slot, over all numbers of rows
    device: Device
    plan: Plan  #: of this op alone
    tiles: TileTable  #: for what the op has beside the GEMM

    @property
    def name(self) -> str:
        """For people and the journal."""
        return f"{self.slot} <= {self.max_rows}" if self.max_rows else f"{self.slot} any"

    @property
    def is_head(self) -> bool:
        """Whether its rows are sampled ones, and one BN serves all numbers of rows."""
        return self.start.name == "lm_head"

    @property
    def halves(self) -> int:
        """Blocks of BN columns that a program computes."""
        return 2 if self.start.name in _PAIRS else 1

    @property
    def columns(self) -> int:
        """That the grid covers, in tiles of BN."""
        constants = self.start.constants
        return self.start.grid[0].times // int(constants.get("SPLIT", 1)) * int(constants["BN"])

    @property
    def depth(self) -> int:
        """Length of its dot products."""
        constants = self.start.constants
        return int(constants["K" if "K" in constants else "H"])

    @property
    def bits(self) -> int:
        """Of a stored weight."""
        return int(self.start.constants["BITS"])

    @property
    def stored(self) -> Stored:
        """Which entries of a tile table it takes."""
        return operand(self.matrix).stored

    def may_take(self, block: int) -> bool:
        """Whether ``block`` of k may be a step of the loop: of fp8 activations, all that has one
        scale."""
        return self.stored != "fp8-a8" or block == operand(self.matrix).deepest

    @cached_property
    def matrix(self) -> PackedTensor:
        """The weights."""
        launch, _, _ = gemm_of(launch_table(self.plan, self.device, self.tiles))
        offset = next(int(a.removeprefix("weight:")) for a in launch.args if "weight:" in a)
        return _tensor_at(self.plan, offset)

    def entry(self, kernel: Kernel, source: str, **measured: Any) -> Entry:
        """The entry of a tile table that gives ``kernel``, and for nothing else."""
        constants = kernel.constants
        split = constants.get("SPLIT", 1)
        tile = {name: constants[name] for name in ("BM", "BN", "BK", "GROUP_M")}
        tile |= {"MIN_PROGRAMS": kernel.grid[0].times if split > 1 else 1, "MAX_SPLIT": split}
        return Entry(kernel.name, self.max_rows, tile, kernel.options, source, self.stored,
                     made_for(constants), **measured)  # fmt: skip

    def table(self, entry: Entry) -> Table:
        """The op's launches with ``entry`` as its only one."""
        others = tuple(e for e in self.tiles.entries if e.kernel != entry.kernel)
        tiles = replace(self.tiles, entries=(replace(entry, made_for=None), *others))
        return launch_table(self.plan, self.device, tiles)

    def trial(self, kernel: Kernel) -> Trial:
        """``kernel`` alone, with its weights at the beginning of the file and copies behind."""
        table = self.table(self.entry(kernel, kernel.source))
        launch, choice, made = gemm_of(table)
        args, copy_bytes = self._packed(launch)
        copies = min(MOST_COPIES, -(-ROTATED_BYTES // copy_bytes))
        only = replace(made, id=0)
        assert only == replace(kernel, id=0), "what is timed is what would be compiled"
        return Trial(
            replace(
                table,
                facts={**table.facts, "layers": 1, "weights_bytes": copies * copy_bytes},
                kernels=(only,),
                launches=(Launch(self.slot, 0, args),),
                choices=(replace(choice, most=0, kernel=0),),
            ),
            Train(copies, copy_bytes, max(copies, _LEAST_LAUNCHES), _SAMPLES, WARMUP_US),
            self.name,
            tuple(_outputs(table)),
        )

    def _packed(self, launch: Launch) -> tuple[tuple[str, ...], int]:
        """The launch's arguments with its tensors side by side, and the bytes of these."""
        moved: dict[str, int] = {}
        end, args = 0, []
        for arg in launch.args:
            where, _, what = arg.partition(":")
            if where == "weight":
                tensor = _tensor_at(self.plan, int(what))
                if tensor.name not in moved:
                    moved[tensor.name] = end
                    end += -(-tensor.nbytes // _ALIGN) * _ALIGN
                arg = f"weight:{moved[tensor.name] + int(what) - tensor.offset}"
            elif where in ("k", "v"):
                arg = f"{where}:0"
            args.append(arg)
        return tuple(args), end


def gemm_of(table: Table) -> tuple[Launch, Choice, Kernel]:
    """The launch that is timed, of those of one op, and the first kernel of its slot."""
    for launch in table.launches:
        choice = next(c for c in table.choices if c.slot == launch.slot)
        if (kernel := table.kernels[choice.kernel]).name in _WRITTEN:
            return launch, choice, kernel
    raise AssertionError(f"no GEMM among {[launch.slot for launch in table.launches]}")


def _outputs(table: Table) -> Iterator[Output]:
    kernel = gemm_of(table)[2].name
    for buffer in table.buffers:
        if buffer.name in _WRITTEN[kernel]:
            kind = SIGNATURES[kernel].args[buffer.name]
            yield f"buffer:{buffer.name}", kind, buffer.nbytes


def _tensor_at(plan: Plan, offset: int) -> PackedTensor:
    return next(t for t in plan.layout.tensors if t.offset <= offset < t.offset + t.nbytes)


def nothing(tiles: TileTable) -> Trial:
    """A table without launches: opening it tells which device is there."""
    facts = {"layers": 1, "hidden": 64, "heads": 1, "kv_heads": 1, "head_dim": 32, "vocab": 64,
             "kv_bytes": 2, "max_seqs": 1, "warp": 32, "layout_hash": 0,
             "weights_bytes": _ALIGN}  # fmt: skip
    return Trial(Table(tiles.target, facts, (), (), (), ()), Train(1, 0, 1, 1))


def tasks_of(
    plan: Plan, device: Device, tiles: TileTable, wanted: Sequence[str], sizes: Sequence[int]
) -> list[Task]:
    """The tasks of a model, in the order of a step. ``wanted`` are ops or slots (none = all),
    ``sizes`` numbers of rows. Raises UsageError for an op that the model has not, and where no
    size is given."""
    if not sizes or min(sizes) < 1:
        raise UsageError(f"--batch-sizes {','.join(map(str, sizes))} must be at least 1 each")
    found = list(_all_tasks(plan, device, tiles, sorted(set(sizes))))
    names = dict.fromkeys(name for t in found for name in (t.slot.partition(".")[0], t.slot))
    for name in wanted:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(names)}"
            raise UsageError(f"--ops {name}: the model has no such GEMM; {hint}")
    return [t for t in found if not wanted or {t.slot, t.slot.partition(".")[0]} & set(wanted)]


def _all_tasks(
    plan: Plan, device: Device, tiles: TileTable, sizes: Sequence[int]
) -> Iterator[Task]:
    seen = set()
    for op in plan.graph.ops:
        if not isinstance(op, ops.NormQkvRopeKv | ops.OResidual | ops.NormGateUpAct
                          | ops.DownResidual | ops.NormLmHeadSample):  # fmt: skip
            continue
        alone = replace(plan, graph=replace(plan.graph, ops=(op,)))
        table = launch_table(alone, device, tiles)
        slot = gemm_of(table)[0].slot
        if slot in seen:
            continue
        seen.add(slot)
        least = 0
        choices = [c for c in table.choices if c.slot == slot and c.kernel != LEFT_OUT]
        for choice in choices:
            most = choice.most or 1 << 30
            limit = MAX_SEQS if choice.unit == "R" else 1 << 30
            rows = {min(n, limit) for n in sizes if least < min(n, limit) <= most}
            least = most
            if rows:
                # The last one's entry is for any number, though a vendor's GEMM may take the most.
                most_rows = 0 if choice is choices[-1] else choice.most
                yield Task(slot, most_rows, tuple(sorted(rows)), table.kernels[choice.kernel],
                           len(choices), device, alone, tiles)  # fmt: skip
