"""The seam between ``compile.py`` and a target: what every backend must offer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sinterlm.artifact.memo import Memo
from sinterlm.ir.fp8 import Fp8Name
from sinterlm.ir.plan import MatrixOrder, Plan
from sinterlm.ir.quant import ActDType


@dataclass(frozen=True)
class Toolchain:
    """All that decides a library's bytes beside its source: part of the code key."""

    compiler: str | None  #: kind, version and machine; None when no compiler is installed
    flags: tuple[str, ...]  #: as given to the compiler, without paths
    headers_sha256: str  #: of every kernel header and ``abi.h``


class Backend(Protocol):
    """A target: turns a Plan into source text, and source text into a library."""

    @property
    def target(self) -> str:
        """The name that ``--target`` takes."""
        ...

    @property
    def library_name(self) -> str:
        """File name of what ``build`` makes."""
        ...

    @property
    def source_name(self) -> str:
        """File name of what ``emit`` makes."""
        ...

    @property
    def weight_order(self) -> MatrixOrder:
        """How matrices are packed."""
        ...

    @property
    def act_dtype(self) -> ActDType | None:
        """The operands beside coded weights, where the target has one kind alone."""
        ...

    @property
    def inputs_sha256(self) -> str:
        """Hex SHA-256 of what ``emit`` reads beside the plan and our own files; "" = nothing."""
        ...

    @property
    def fp8(self) -> Fp8Name | None:
        """How the target writes fp8 numbers; None = it has no kernels for them."""
        ...

    def resolve_isa(self, isa: str | None) -> str:
        """The level to build for; None = the best this machine has. Raises UsageError."""
        ...

    def toolchain(self, isa: str, memo: Memo) -> Toolchain:
        """Identify compiler, flags and headers without compiling anything."""
        ...

    def emit(self, plan: Plan, isa: str) -> str:
        """Source text of the library; a pure function of its arguments."""
        ...

    def build(self, source: str, isa: str, out: Path, memo: Memo) -> None:
        """Compile ``source`` into the shared library ``out``. Raises CompileError."""
        ...
