"""A GPU target behind the ``Backend`` protocol: the launch table, Triton as the compiler of its
kernels, and a C++ compiler for the host, once for all models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sinterlm.artifact.memo import Memo, digest_json
from sinterlm.backends.base import Toolchain
from sinterlm.backends.cxx import toolchain
from sinterlm.backends.gpu import library, objects
from sinterlm.backends.gpu.devices import Device
from sinterlm.backends.gpu.launch import launch_table
from sinterlm.backends.gpu.table import Table
from sinterlm.backends.gpu.tuning import TileTable
from sinterlm.errors import CompileError, UsageError
from sinterlm.ir.fp8 import Fp8Name
from sinterlm.ir.plan import MatrixOrder, Plan
from sinterlm.ir.quant import ActDType


@dataclass(frozen=True)
class GpuBackend:
    """One launch table per model, with code objects for one device family, behind a host."""

    device: Device
    tiles: TileTable
    library_name: str = "model.so"
    source_name: str = "model.table"
    weight_order: MatrixOrder = "tiles"  #: "pitched" = for the vendor's GEMM
    act_dtype: ActDType | None = "graph"

    @property
    def target(self) -> str:
        """The device's name."""
        return self.device.name

    @property
    def inputs_sha256(self) -> str:
        """Of the tile table."""
        return digest_json(self.tiles.to_json())

    @property
    def fp8(self) -> Fp8Name:
        """As the device's matrix instructions take them."""
        return self.device.fp8

    def resolve_isa(self, isa: str | None) -> str:
        """The device's name: it has one instruction set. Raises UsageError for any other."""
        if isa not in (None, self.device.name):
            raise UsageError(f"--isa {isa} is of a CPU; leave it out with --target {self.target}")
        return self.device.name

    def toolchain(self, isa: str, memo: Memo) -> Toolchain:
        """Triton, the C++ compiler and all sources; ``compiler`` is None where one is missing."""
        sources = f"{objects.sources_sha256()} {library.host_sha256()}"
        version = objects.triton_version()
        try:
            cxx = toolchain.find_compiler(memo=memo)
        except CompileError:
            return Toolchain(None, (), sources)
        compiler = None if version is None else f"triton {version}; {cxx.identity}"
        return Toolchain(compiler, toolchain.flags_for("generic", cxx), sources)

    def emit(self, plan: Plan, isa: str) -> str:
        """The launch table's text."""
        return launch_table(plan, self.device, self.tiles).to_text()

    def build(self, source: str, isa: str, out: Path, memo: Memo) -> None:
        """Compile the kernels of ``source`` and write the host with table and objects to ``out``.
        Raises CompileError."""
        kernels = Table.from_text(source).own_kernels
        host = library.host_library(memo)
        made = objects.compile_objects(kernels, self.device, memo)
        out.write_bytes(library.join(host, objects.archive(source, made)))
