"""Attention: of decoding rows, for few sequences and for many, and of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from sinterlm.backends.gpu.devices import Device
from sinterlm.backends.gpu.launch import MAX_SEQS, launch_table
from sinterlm.backends.gpu.table import Choice, Kernel, Launch, Table
from sinterlm.backends.gpu.tuning import Entry, TileTable, made_for
from sinterlm.ir.plan import Plan
from sinterlm.runtime.device_probe import PAGE, Step
from sinterlm.tune.tasks import Cut, Trial, copies_of, outputs_of, train

#: Most sequences of the decoding rows that have a kernel of their own, as GEMMs have one for as
#: many rows: few sequences need more ranges of keys to fill a device. 0 = any number.
BRACKETS = (16, 0)
#: Ranges of keys: so many programs fill every device several times over, and what they leave takes
#: so many bytes per sequence.
_MOST_SEGMENTS, _MOST_PROGRAMS, _MOST_PART_BYTES = 128, 1024, 4 << 20
#: Of pages that launches rotate through: of a narrow window they are more than what is read.
_MOST_PAGE_BYTES = 8 << 30


@dataclass(frozen=True)
class AttentionCut(Cut):
    """How attention is cut: rows and keys of a tile, ranges of keys."""

    BM: int
    TILE: int
    SEGMENTS: int


@dataclass(frozen=True)
class AttentionTask:
    """Attention of decoding rows of at most ``max_seqs`` sequences (0 = any number), or of prompts.
    See ``tasks.Task``."""

    slot: str  #: as the launch table calls it
    is_decode: bool
    max_seqs: int
    steps: tuple[Step, ...]
    start: Kernel
    device: Device
    plan: Plan  #: of this op alone
    tiles: TileTable
    num_joined: int = 0  #: each kernel may be cut as it likes

    @property
    def name(self) -> str:
        """See ``Task``."""
        if not self.is_decode:
            return f"{self.slot} prompts"
        return f"{self.slot} decode {f'<= {self.max_seqs}' if self.max_seqs else 'any'}"

    @property
    def target(self) -> str:
        """See ``Task``."""
        return self.device.name

    def label(self, step: Step) -> str:
        """Sequences x keys of each; of a prompt its tokens."""
        return f"{step.seqs}x{step.context}" if self.is_decode else str(step.tokens)

    def nbytes(self, step: Step) -> int:
        """Keys and values of decoding rows, once for a group of query heads."""
        return self._read(step) if self.is_decode else 0

    def _read(self, step: Step) -> int:
        """Keys and values, of a prompt once."""
        window = int(self.start.constants["WINDOW"]) or step.context
        new = step.tokens // step.seqs
        return step.seqs * min(step.context, window + new - 1) * self._token_bytes

    @property
    def _token_bytes(self) -> int:
        """Of a token's keys and values in the layer."""
        constants = self.start.constants
        return 2 * int(constants["HKV"]) * int(constants["D"]) * (1 if constants["KV_FP8"] else 2)

    # -- cuts --------------------------------------------------------------------------------------

    def cut_of(self, kernel: Kernel) -> AttentionCut:
        """See ``Task``."""
        return AttentionCut.of(kernel)

    def cuts(self) -> list[Cut]:
        """See ``Task``."""
        start = self.cut_of(self.start)
        return [start, *(cut for cut in self._grid() if cut != start and self.is_legal(cut))]

    def _grid(self) -> Iterator[AttentionCut]:
        is_hip, least = self.device.vendor == "hip", self._least_rows
        segments = [1 << i for i in range(_MOST_SEGMENTS.bit_length())] if self.is_decode else [1]
        for bm, keys, parts, warps, stages, waves in product(
            (least,) if self.is_decode else (32, 64, 128, 256),
            (16, 32, 64, 128, 256),
            segments,
            (1, 2, 4, 8) if self.is_decode else (2, 4, 8),
            (1, 2, 3) if is_hip else (1, 2, 3, 4),
            (0, 2) if is_hip else (0,),
        ):
            yield AttentionCut(warps, stages, waves, bm, keys, parts)

    @property
    def _least_rows(self) -> int:
        """Of a tile: a token's query heads of one KV head, and what matrix instructions take."""
        return max(16, 1 << (int(self.start.constants["GROUP"]) - 1).bit_length())

    def is_legal(self, cut: AttentionCut) -> bool:
        """Whether a kernel cut so can be: every warp has a matrix instruction's worth of sums,
        shared memory and registers hold the least they must, and ranges of keys are no more than
        can be of use."""
        device, constants = self.device, self.start.constants
        dim, heads = int(constants["D"]), int(constants["HKV"])
        threads = cut.num_warps * device.warp
        tile = cut.TILE * dim * (1 if constants["KV_FP8"] else 2)
        return (
            self._least_rows <= cut.BM
            and 256 * cut.num_warps <= cut.BM * max(cut.TILE, dim)
            and (device.vendor == "hip" or cut.BM < 64 or cut.num_warps >= 4)
            # Keys or values of a stage, one buffer less than stages.
            and tile * max(1, cut.num_stages - 1) <= device.shared_bytes
            and cut.BM * (dim + cut.TILE) // threads <= device.max_registers
            and (cut.SEGMENTS == 1 or cut.SEGMENTS * heads <= _MOST_PROGRAMS)
            and heads * cut.SEGMENTS * cut.BM * dim * 4 <= _MOST_PART_BYTES
        )

    def kernel_of(self, cut: Cut) -> Kernel | None:
        """See ``Task``."""
        assert isinstance(cut, AttentionCut)
        tile = {"BM": cut.BM, "TILE": cut.TILE, "SEGMENTS": cut.SEGMENTS}
        wanted = replace(self.start, constants={**self.start.constants, **tile},
                         options=cut.options(self.start.options))  # fmt: skip
        made = self._find(self.table(self.entry(wanted, "a candidate")))[1]
        return made if self.cut_of(made) == cut else None

    # -- entries and trials ------------------------------------------------------------------------

    def entry(self, kernel: Kernel, source: str, **measured: Any) -> Entry:
        """See ``Task``."""
        constants = kernel.constants
        tile = {name: constants[name] for name in ("BM", "TILE", "SEGMENTS")}
        which = "attention_decode" if self.is_decode else "attention"
        return Entry(which, self.max_seqs, tile, kernel.options, source,
                     made_for=made_for(constants), **measured)  # fmt: skip

    def table(self, entry: Entry) -> Table:
        """The op's launch with ``entry`` as the only one for its rows."""
        others = tuple(e for e in self.tiles.entries if e.kernel != entry.kernel)
        tiles = replace(self.tiles, entries=(entry, *others))
        return launch_table(self.plan, self.device, tiles)

    def _find(self, table: Table) -> tuple[Choice, Kernel]:
        """The choice of this task, and its kernel."""
        kind = "decode" if self.is_decode else "any"
        choice = next(c for c in table.choices if c.slot == self.slot and c.kind == kind)
        return choice, table.kernels[choice.kernel]

    def trial(self, kernel: Kernel) -> Trial:
        """With pages that launches rotate through, and scales of 1."""
        table = self.table(self.entry(kernel, kernel.source))
        choice, made = self._find(table)
        only = replace(made, id=0)
        assert only == replace(kernel, id=0), "what is timed is what would be compiled"
        sets = [self._sets(step) for step in self.steps]
        pages = max(step.pages * count for step, count in zip(self.steps, sets, strict=True))
        return Trial(
            replace(
                table,
                facts={**table.facts, "layers": 1, "weights_bytes": 256},
                kernels=(only,),
                launches=(Launch(self.slot, 0, _alone(table.launches[0].args)),),
                choices=(replace(choice, most=0, kernel=0),),
            ),
            tuple(
                (step, replace(train(count, 0), copies=1))
                for step, count in zip(self.steps, sets, strict=True)
            ),
            self.name,
            outputs_of(table, kernel.name, ("y",)),
            self.steps[-1].tokens,
            pages,
        )

    def _sets(self, step: Step) -> int:
        """Pages of so many such steps are rotated through."""
        page_bytes = step.pages * PAGE * self._token_bytes
        return max(1, min(copies_of(self._read(step)), _MOST_PAGE_BYTES // page_bytes))


def _alone(args: Sequence[str]) -> tuple[str, ...]:
    """The arguments of any layer as those of the only one."""
    held = {"k": "k:0", "v": "v:0", "number": "number:1.0"}
    return tuple(held.get(arg.partition(":")[0], arg) for arg in args)


def attention_tasks(
    alone: Plan, device: Device, tiles: TileTable, sizes: Sequence[int], contexts: Sequence[int],
    prompts: Sequence[int],
) -> Iterator[AttentionTask]:  # fmt: skip
    """Those of a plan of one attention op: decoding rows of each of ``sizes`` sequences with each
    of ``contexts`` keys, and prompts of so many tokens; all ascending."""
    table = launch_table(alone, device, tiles)
    slot = table.launches[0].slot
    least = 0
    for most in BRACKETS:
        within = most or MAX_SEQS
        steps = [Step(n, 0, n, keys) for n in sizes if least < n <= within for keys in contexts]
        least = within
        if steps:
            kernel = table.kernel_of(slot, {"T": within, "R": 0, "S": within, "N": 0}, True)
            assert kernel is not None
            yield AttentionTask(slot, True, most, tuple(steps), kernel, device, alone, tiles)
    if prompts:
        kernel = table.kernel_of(slot, {"T": prompts[-1], "R": 0, "S": 1, "N": 0}, False)
        assert kernel is not None
        yield AttentionTask(slot, False, 0, tuple(Step(n) for n in prompts), kernel, device, alone,
                            tiles)  # fmt: skip
