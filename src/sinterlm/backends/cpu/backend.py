"""The CPU target behind the ``Backend`` protocol: emitter and C++ toolchain put together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sinterlm.artifact.memo import Memo
from sinterlm.backends.base import Toolchain
from sinterlm.backends.cxx import toolchain
from sinterlm.backends.cxx.isa import best_isa, parse_isa
from sinterlm.errors import CompileError
from sinterlm.ir.fp8 import Fp8Name
from sinterlm.ir.plan import MatrixOrder, Plan
from sinterlm.ir.quant import ActDType


@dataclass(frozen=True)
class CpuBackend:
    """One C++ translation unit per model, compiled for one ISA level."""

    target: str = "cpu"
    library_name: str = "model.so"
    source_name: str = "model.cpp"
    weight_order: MatrixOrder = "panels"
    act_dtype: ActDType | None = None
    inputs_sha256: str = ""
    fp8: Fp8Name | None = None

    def resolve_isa(self, isa: str | None) -> str:
        """``isa`` checked, or this machine's widest level. Raises UsageError for unknown names."""
        return best_isa() if isa is None else parse_isa(isa)

    def toolchain(self, isa: str, memo: Memo) -> Toolchain:
        """Compiler, flags and headers; ``compiler`` is None where none is installed."""
        level = parse_isa(isa)
        try:
            compiler = toolchain.find_compiler(memo=memo)
        except CompileError:
            return Toolchain(None, toolchain.flags_for(level), toolchain.headers_sha256())
        flags = toolchain.flags_for(level, compiler)
        return Toolchain(compiler.identity, flags, toolchain.headers_sha256())

    def emit(self, plan: Plan, isa: str) -> str:
        """C++ source of the model's library."""
        from sinterlm.backends.cpu.emit import emit

        return emit(plan, parse_isa(isa))

    def build(self, source: str, isa: str, out: Path, memo: Memo) -> None:
        """Compile ``source`` into ``out``. Raises CompileError."""
        compiler = toolchain.find_compiler(memo=memo)
        toolchain.compile_library(source, out, parse_isa(isa), compiler)
