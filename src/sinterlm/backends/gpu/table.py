"""The launch table: everything that a host does to run a model on a GPU, as data in plain lines.

One line is one noun, its first word says which. The compiler writes the table, the interpreter and
the host read it; the code objects follow behind the line ``end`` (see ``objects.py``).

    fact NAME NUMBER                              what the host must know of the model
    buffer NAME UNIT BYTES OFFSET                 BYTES per unit at OFFSET of the unit's arena
    kernel ID NAME X Y Z JSON                     grid, and what it is compiled for
    launch SLOT LAYER ARG …                       in the order of a step
    choice SLOT UNIT MOST KIND KERNEL             what fills a slot, the first that fits; -1 = none
    product KERNEL N K W_PITCH                    that it is the vendor's GEMM (``vendor.py``)

Units: T tokens, R sampled rows, S sequences, N tokens whose hidden states are given out (all or
none), 1 once. An axis of a grid is SYMBOL/PER*TIMES: TIMES for each PER units begun, and ``+S`` one
more per sequence; a launch whose grid is empty is left out. An argument is null, buffer:NAME,
weight:OFFSET, input:NAME, k:LAYER, v:LAYER, value:NAME or number:FP32.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from sinterlm.backends.gpu.vendor import VENDOR_GEMM

Unit = Literal["T", "R", "S", "N", "1"]

HEADING = "sinterlm-launch-table 1"

#: The kernel of a choice that leaves the launch out.
LEFT_OUT = -1


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

    @property
    def is_vendor(self) -> bool:
        """Whether it is the vendor's GEMM, which has no code object."""
        return self.name == VENDOR_GEMM


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
    kernel: int  #: LEFT_OUT = none: other launches do its work

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

    def kernel_of(self, slot: str, sizes: dict[str, int], is_decode: bool) -> Kernel | None:
        """The kernel that fills ``slot`` in such a step; None where the launch is left out."""
        for choice in self.choices:
            if choice.slot == slot and choice.fits(sizes, is_decode):
                return None if choice.kernel == LEFT_OUT else self.kernels[choice.kernel]
        raise LookupError(f"no kernel for {slot} at {sizes}")

    def launches_of(self, sizes: dict[str, int], is_decode: bool) -> list[tuple[Launch, Kernel]]:
        """The launches of such a step with their kernels, in order."""
        found = []
        for launch in self.launches:
            kernel = self.kernel_of(launch.slot, sizes, is_decode)
            if kernel is not None and all(axis.count(sizes) for axis in kernel.grid):
                found.append((launch, kernel))
        return found

    @property
    def per_step(self) -> int:
        """Launches of a step of one token that is drawn, and gives no hidden states out."""
        return len(self.launches_of({"T": 1, "R": 1, "S": 1, "N": 0}, True))

    @property
    def own_kernels(self) -> tuple[Kernel, ...]:
        """Those with a code object."""
        return tuple(kernel for kernel in self.kernels if not kernel.is_vendor)

    @property
    def uses_vendor(self) -> bool:
        """Whether steps of many rows use the vendor's GEMM."""
        return any(kernel.is_vendor for kernel in self.kernels)

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
        for k in self.kernels:
            if k.is_vendor:
                shape = " ".join(str(k.constants[name]) for name in ("N", "K", "W_PITCH"))
                lines.append(f"product {k.id} {shape}")
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
