"""Which tiles a GEMM may have, and how far apart two of them are.

What is left out here could not compile or would be refused then: shared memory, registers and
divisibility are bounded from below, and the gates of ``backends.gpu.objects`` judge every object.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import product
from math import log2

from sinterlm.backends.gpu.table import Kernel
from sinterlm.tune.tasks import Task, gemm_of

_DEEPEST = 16  #: splits of the depth


@dataclass(frozen=True)
class Cut:
    """How a GEMM is cut, and the compiler's options that go with it."""

    BM: int
    BN: int
    BK: int
    SPLIT: int
    GROUP_M: int
    num_warps: int
    num_stages: int
    waves_per_eu: int  #: 0 = the compiler's choice, and where there is no such option

    @classmethod
    def of(cls, kernel: Kernel) -> Cut:
        """That of a compiled kernel."""
        held = {"SPLIT": 1, "waves_per_eu": 0, **kernel.constants, **kernel.options}
        return cls(**{field.name: held[field.name] for field in fields(cls)})

    def steps_to(self, other: Cut) -> float:
        """How many times something would be doubled or halved; a stage counts as one step."""
        total = float(abs(self.num_stages - other.num_stages))
        total += abs(self.waves_per_eu - other.waves_per_eu) / 2
        for name in ("BM", "BN", "BK", "SPLIT", "GROUP_M", "num_warps"):
            total += abs(log2(getattr(self, name) / getattr(other, name)))
        return total


def cuts_for(task: Task) -> list[Cut]:
    """Every legal cut, that of ``task.start`` first."""
    start = Cut.of(task.start)
    return [start, *(cut for cut in _grid(task) if cut != start and is_legal(cut, task))]


def _grid(task: Task) -> Iterator[Cut]:
    is_hip, few = task.device.vendor == "hip", task.max_rows > 0
    rows = (16,) if 0 < task.max_rows <= 16 else (16, 32, 64) if few else (64, 128, 256)
    splits = [1 << i for i in range(_DEEPEST.bit_length())] if few and not task.is_head else [1]
    for values in product(
        rows,
        (16, 32, 64, 128, 256),
        (64, 128, 256),
        splits,
        (1,) if few else (1, 4, 8),
        (2, 4, 8),
        (1, 2, 3) if is_hip else (2, 3, 4, 5),
        (0, 2) if is_hip else (0,),
    ):
        yield Cut(*values)


def is_legal(cut: Cut, task: Task) -> bool:
    """Whether a kernel cut so can be: tiles divide the matrix, every warp has a matrix
    instruction's worth of sums, and shared memory and registers hold the least they must."""
    device, columns = task.device, cut.BN * task.halves
    threads = cut.num_warps * device.warp
    stage = cut.BM * cut.BK * 2 + columns * cut.BK * task.bits // 8
    return (
        task.columns % cut.BN == 0
        and task.depth % cut.BK == 0
        and task.depth // cut.BK >= cut.SPLIT
        and task.may_take(cut.BK)
        and cut.BM * columns >= 256 * cut.num_warps
        # What multiplies 64 rows or more on NVIDIA's is an instruction of four warps.
        and (device.vendor == "hip" or cut.BM < 64 or cut.num_warps >= 4)
        # One buffer less than stages, as a stage may be in registers.
        and stage * max(1, cut.num_stages - 1) <= device.shared_bytes
        and 2 * cut.BM * columns // threads <= device.max_registers
    )


def kernel_of(cut: Cut, task: Task) -> Kernel | None:
    """The kernel that compiling makes of ``cut``; None where the op needs another one."""
    held = {"num_warps": cut.num_warps, "num_stages": cut.num_stages}
    if "waves_per_eu" in task.start.options:
        held["waves_per_eu"] = cut.waves_per_eu
    constants = {**task.start.constants, "BM": cut.BM, "BN": cut.BN, "BK": cut.BK,
                 "GROUP_M": cut.GROUP_M, "SPLIT": cut.SPLIT}  # fmt: skip
    times = task.columns // cut.BN * cut.SPLIT
    x, y, z = task.start.grid
    wanted = replace(task.start, grid=(replace(x, per=cut.BM, times=times), y, z),
                     constants=constants, options={**task.start.options, **held})  # fmt: skip
    made = gemm_of(task.table(task.entry(wanted, "a candidate")))[2]
    return made if Cut.of(made) == cut else None
