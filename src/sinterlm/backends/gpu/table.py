"""The launch table: everything that a host does to run a model on a GPU, as data in plain lines.

One line is one noun, its first word says which. The compiler writes the table, the interpreter and
the host read it; the code objects follow behind the line ``end`` (see ``objects.py``).

    fact NAME NUMBER                              what the host must know of the model
    buffer NAME UNIT BYTES OFFSET                 BYTES per unit at OFFSET of the unit's arena
    kernel ID NAME X Y Z JSON                     grid, and what it is compiled for
    launch SLOT LAYER ARG …                       in the order of a step
    choice SLOT UNIT MOST KIND KERNEL             which kernel fills a slot; the first that fits

Units: T tokens, R sampled rows, S sequences, N tokens whose hidden states are given out (all or
none), 1 once. An axis of a grid is SYMBOL/PER*TIMES: TIMES for each PER units begun, and ``+S`` one
more per sequence; a launch whose grid is empty is left out. An argument is ``buffer:NAME``,
``weight:OFFSET``, ``input:NAME``, ``k:LAYER``, ``v:LAYER``, ``value:NAME``, ``number:FP32`` or
``null``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

Unit = Literal["T", "R", "S", "N", "1"]

HEADING = "sinterlm-launch-table 1"


@dataclass(frozen=True)
class Axis:
    """Programs along one axis of a grid."""

    symbol: Unit
    per: int = 1
    times: int = 1
    plus_seqs: bool = False

    def count(self, sizes: dict[str, int]) -> int:
        """For ``sizes`` of T, R, S and N."""
        units = 1 if self.symbol == "1" else sizes[self.symbol]
        return -(-units // self.per) * self.times + (sizes["S"] if self.plus_seqs else 0)

    def __str__(self) -> str:
        return f"{self.symbol}/{self.per}*{self.times}{'+S' if self.plus_seqs else ''}"

    @classmethod
    def parse(cls, text: str) -> Axis:
        """Inverse of ``str``. Raises ValueError."""
        found = re.fullmatch(r"([TRSN1])/([1-9]\d*)\*([1-9]\d*)(\+S)?", text)
        if found is None:
            raise ValueError(f"{text!r} is no axis of a grid")
        symbol: Any = found[1]
        return cls(symbol, int(found[2]), int(found[3]), found[4] is not None)


@dataclass(frozen=True)
class Buffer:
    """``nbytes`` per unit; in an arena for N units it begins at ``offset * N``."""

    name: str
    unit: Unit
    nbytes: int
    offset: int


@dataclass(frozen=True)
class Kernel:
    """A kernel with all it is compiled for."""

    id: int
    name: str  #: a key of SIGNATURES
    grid: tuple[Axis, Axis, Axis]
    constants: dict[str, Any]
    options: dict[str, Any]  #: of the compiler: warps, stages, …
    source: str  #: where the tile comes from


@dataclass(frozen=True)
class Launch:
    """One launch of a step. ``args`` follow the kernel's signature."""

    slot: str  #: the fused op, and what sets its kernel apart from other layers'
    layer: int  #: -1 outside layers
    args: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """A kernel for a slot, for steps of at most ``most`` units (0 = any number)."""

    slot: str
    unit: Unit
    most: int
    kind: Literal["any", "decode"]  #: decode: every sequence has one token in the step
    kernel: int

    def fits(self, sizes: dict[str, int], is_decode: bool) -> bool:
        """Whether it may be used for such a step."""
        within = self.most == 0 or sizes[self.unit] <= self.most
        return within and (self.kind == "any" or is_decode)


@dataclass(frozen=True)
class Table:
    """See the module's text."""

    device: str
    facts: dict[str, int]
    buffers: tuple[Buffer, ...]
    kernels: tuple[Kernel, ...]
    launches: tuple[Launch, ...]
    choices: tuple[Choice, ...]

    def kernel_of(self, slot: str, sizes: dict[str, int], is_decode: bool) -> Kernel:
        """The kernel that fills ``slot`` in such a step."""
        for choice in self.choices:
            if choice.slot == slot and choice.fits(sizes, is_decode):
                return self.kernels[choice.kernel]
        raise LookupError(f"no kernel for {slot} at {sizes}")

    @property
    def per_step(self) -> int:
        """Launches of a step that draws tokens and gives no hidden states out."""
        left_out = {
            choice.slot
            for choice in self.choices
            if any(axis.symbol == "N" for axis in self.kernels[choice.kernel].grid)
        }
        return sum(launch.slot not in left_out for launch in self.launches)

    def arena_bytes(self, unit: Unit) -> int:
        """Bytes of a unit's arena, per unit."""
        return max((b.offset + b.nbytes for b in self.buffers if b.unit == unit), default=0)

    def to_text(self) -> str:
        """The lines, without code objects."""
        lines = [HEADING, f"device {self.device}"]
        lines += [f"fact {name} {value}" for name, value in self.facts.items()]
        lines += [f"buffer {b.name} {b.unit} {b.nbytes} {b.offset}" for b in self.buffers]
        for k in self.kernels:
            made_for = {"constants": k.constants, "options": k.options, "source": k.source}
            grid = " ".join(map(str, k.grid))
            lines.append(f"kernel {k.id} {k.name} {grid} {json.dumps(made_for, sort_keys=True)}")
        lines += [f"launch {i.slot} {i.layer} {' '.join(i.args)}" for i in self.launches]
        lines += [f"choice {c.slot} {c.unit} {c.most} {c.kind} {c.kernel}" for c in self.choices]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_text(cls, text: str) -> Table:
        """Inverse of ``to_text``; lines of other nouns are left to others. Raises ValueError."""
        lines = text.splitlines()
        if lines[:1] != [HEADING]:
            raise ValueError(f"it does not begin with {HEADING!r}")
        device, facts = "", {}
        buffers, kernels, launches, choices = [], [], [], []
        for line in lines[1:]:
            noun, *words = line.split(" ")
            if noun == "device":
                (device,) = words
            elif noun == "fact":
                facts[words[0]] = int(words[1])
            elif noun == "buffer":
                unit: Any = words[1]
                buffers.append(Buffer(words[0], unit, int(words[2]), int(words[3])))
            elif noun == "kernel":
                made_for = json.loads(" ".join(words[5:]))
                x, y, z = map(Axis.parse, words[2:5])
                kernels.append(Kernel(int(words[0]), words[1], (x, y, z), **made_for))
            elif noun == "launch":
                launches.append(Launch(words[0], int(words[1]), tuple(words[2:])))
            elif noun == "choice":
                per: Any = words[1]
                kind: Any = words[3]
                choices.append(Choice(words[0], per, int(words[2]), kind, int(words[4])))
        return cls(device, facts, tuple(buffers), tuple(kernels), tuple(launches), tuple(choices))
