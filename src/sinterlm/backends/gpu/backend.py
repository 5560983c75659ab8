"""A GPU target behind the ``Backend`` protocol: the launch table, and Triton as its compiler."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sinterlm.artifact.memo import Memo
from sinterlm.backends.base import Toolchain
from sinterlm.backends.gpu import objects
from sinterlm.backends.gpu.devices import Device
from sinterlm.backends.gpu.launch import launch_table
from sinterlm.backends.gpu.table import Table
from sinterlm.errors import UsageError
from sinterlm.ir.plan import MatrixOrder, Plan


@dataclass(frozen=True)
class GpuBackend:
    """One launch table per model, with code objects for one device family."""

    device: Device
    library_name: str = "model.gpu"
    source_name: str = "model.table"
    weight_order: MatrixOrder = "tiles"

    @property
    def target(self) -> str:
        """The device's name."""
        return self.device.name

    def resolve_isa(self, isa: str | None) -> str:
        """The device's name: it has one instruction set. Raises UsageError for any other."""
        if isa not in (None, self.device.name):
            raise UsageError(f"--isa {isa} is of a CPU; leave it out with --target {self.target}")
        return self.device.name

    def toolchain(self, isa: str, memo: Memo) -> Toolchain:
        """Triton's version, and the kernels' sources; ``compiler`` is None without Triton."""
        version = objects.triton_version()
        compiler = None if version is None else f"triton {version}"
        return Toolchain(compiler, (), objects.sources_sha256())

    def emit(self, plan: Plan, isa: str) -> str:
        """The launch table's text."""
        return launch_table(plan, self.device).to_text()

    def build(self, source: str, isa: str, out: Path, memo: Memo) -> None:
        """Compile the kernels of ``source`` and write table and objects to ``out``. Raises
        CompileError."""
        kernels = Table.from_text(source).kernels
        made = objects.compile_objects(kernels, self.device, memo)
        out.write_bytes(objects.archive(source, made))
