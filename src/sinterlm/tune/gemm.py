"""GEMMs: one of a model for each number of rows that has a kernel of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from sinterlm.backends.gpu.devices import Device
from sinterlm.backends.gpu.launch import MAX_SEQS, launch_table
from sinterlm.backends.gpu.operands import operand
from sinterlm.backends.gpu.table import LEFT_OUT, Choice, Kernel, Launch, Table
from sinterlm.backends.gpu.tuning import Entry, Stored, TileTable, made_for
from sinterlm.ir.plan import PackedTensor, Plan
from sinterlm.runtime.device_probe import Step
from sinterlm.tune.tasks import Cut, Trial, aligned, copies_of, outputs_of, train

_DEEPEST = 16  #: splits of the depth
#: Kernels that compute two blocks of columns at once.
_PAIRS = ("norm_qkv_rope_kv", "norm_gate_up_act")
#: What kernels write that is looked at. Keys and values go through the same sums as queries.
_WRITTEN = {"norm_qkv_rope_kv": ("q",), "residual_matmul": ("x", "xw", "ssq"),
            "norm_gate_up_act": ("h",), "lm_head": ("logits",)}  # fmt: skip


@dataclass(frozen=True)
class GemmCut(Cut):
    """How a GEMM is cut."""

    BM: int
    BN: int
    BK: int
    SPLIT: int
    GROUP_M: int

    @property
    def width(self) -> int:
        """See ``Cut``."""
        return self.BN


@dataclass(frozen=True)
class GemmTask:
    """One GEMM in steps of at most ``max_rows`` rows (0 = any number). See ``tasks.Task``."""

    slot: str  #: as the launch table calls it
    max_rows: int
    rows: tuple[int, ...]  #: that it is timed at, ascending
    start: Kernel
    num_kernels: int  #: of the slot, over all numbers of rows
    device: Device
    plan: Plan  #: of this op alone
    tiles: TileTable  #: for what the op has beside the GEMM

    @property
    def name(self) -> str:
        """See ``Task``."""
        return f"{self.slot} <= {self.max_rows}" if self.max_rows else f"{self.slot} any"

    @property
    def target(self) -> str:
        """See ``Task``."""
        return self.device.name

    @property
    def steps(self) -> tuple[Step, ...]:
        """See ``Task``."""
        return tuple(Step(n, n if self.is_head else 0) for n in self.rows)

    def label(self, step: Step) -> str:
        """Its rows."""
        return str(step.tokens)

    def nbytes(self, step: Step) -> int:
        """The weights, however many rows there are."""
        return self.matrix.nbytes

    @property
    def is_head(self) -> bool:
        """Whether its rows are sampled ones, and one BN serves all numbers of rows."""
        return self.start.name == "lm_head"

    @property
    def num_joined(self) -> int:
        """One merge reads what all kernels of the head leave."""
        return self.num_kernels if self.is_head else 0

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

    # -- cuts --------------------------------------------------------------------------------------

    def cut_of(self, kernel: Kernel) -> GemmCut:
        """See ``Task``."""
        return GemmCut.of(kernel)

    def cuts(self) -> list[Cut]:
        """See ``Task``."""
        start = self.cut_of(self.start)
        return [start, *(cut for cut in self._grid() if cut != start and self.is_legal(cut))]

    def _grid(self) -> Iterator[GemmCut]:
        is_hip, few = self.device.vendor == "hip", self.max_rows > 0
        rows = (16,) if 0 < self.max_rows <= 16 else (16, 32, 64) if few else (64, 128, 256)
        splits = [1 << i for i in range(_DEEPEST.bit_length())] if few and not self.is_head else [1]
        for bm, bn, bk, split, group, warps, stages, waves in product(
            rows,
            (16, 32, 64, 128, 256),
            (64, 128, 256),
            splits,
            (1,) if few else (1, 4, 8),
            (2, 4, 8),
            (1, 2, 3) if is_hip else (2, 3, 4, 5),
            (0, 2) if is_hip else (0,),
        ):
            yield GemmCut(warps, stages, waves, bm, bn, bk, split, group)

    def is_legal(self, cut: GemmCut) -> bool:
        """Whether a kernel cut so can be: tiles divide the matrix, every warp has a matrix
        instruction's worth of sums, and shared memory and registers hold the least they must."""
        device, columns = self.device, cut.BN * self.halves
        threads = cut.num_warps * device.warp
        stage = cut.BM * cut.BK * 2 + columns * cut.BK * self.bits // 8
        return (
            self.columns % cut.BN == 0
            and self.depth % cut.BK == 0
            and self.depth // cut.BK >= cut.SPLIT
            and self.may_take(cut.BK)
            and cut.BM * columns >= 256 * cut.num_warps
            # What multiplies 64 rows or more on NVIDIA's is an instruction of four warps.
            and (device.vendor == "hip" or cut.BM < 64 or cut.num_warps >= 4)
            # One buffer less than stages, as a stage may be in registers.
            and stage * max(1, cut.num_stages - 1) <= device.shared_bytes
            and 2 * cut.BM * columns // threads <= device.max_registers
        )

    def kernel_of(self, cut: Cut) -> Kernel | None:
        """See ``Task``."""
        assert isinstance(cut, GemmCut)
        constants = {**self.start.constants, "BM": cut.BM, "BN": cut.BN, "BK": cut.BK,
                     "GROUP_M": cut.GROUP_M, "SPLIT": cut.SPLIT}  # fmt: skip
        times = self.columns // cut.BN * cut.SPLIT
        x, y, z = self.start.grid
        wanted = replace(self.start, grid=(replace(x, per=cut.BM, times=times), y, z),
                         constants=constants, options=cut.options(self.start.options))  # fmt: skip
        made = gemm_of(self.table(self.entry(wanted, "a candidate")))[2]
        return made if self.cut_of(made) == cut else None

    # -- entries and trials ------------------------------------------------------------------------

    def entry(self, kernel: Kernel, source: str, **measured: Any) -> Entry:
        """See ``Task``."""
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
        """With its weights at the beginning of the file and copies behind."""
        table = self.table(self.entry(kernel, kernel.source))
        launch, choice, made = gemm_of(table)
        args, copy_bytes = self._packed(launch)
        copies = copies_of(copy_bytes)
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
            tuple((step, train(copies, copy_bytes)) for step in self.steps),
            self.name,
            outputs_of(table, kernel.name, _WRITTEN[kernel.name]),
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
                    end += aligned(tensor.nbytes)
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


def _tensor_at(plan: Plan, offset: int) -> PackedTensor:
    return next(t for t in plan.layout.tensors if t.offset <= offset < t.offset + t.nbytes)


def gemm_tasks(
    alone: Plan, device: Device, tiles: TileTable, sizes: Sequence[int]
) -> Iterator[GemmTask]:
    """Those of a plan of one op, timed at ``sizes`` rows, ascending."""
    table = launch_table(alone, device, tiles)
    slot = gemm_of(table)[0].slot
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
            yield GemmTask(slot, most_rows, tuple(sorted(rows)), table.kernels[choice.kernel],
                           len(choices), device, alone, tiles)  # fmt: skip
