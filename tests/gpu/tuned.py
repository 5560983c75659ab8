"""A tiny model's tasks, and timers that need no device, for tests of ``sinterlm tune``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sinterlm.backends.gpu.devices import DEVICES
from sinterlm.backends.gpu.library import archive_of
from sinterlm.backends.gpu.objects import Object, read_archive
from sinterlm.backends.gpu.table import Kernel
from sinterlm.backends.gpu.tuning import read_tiles
from sinterlm.passes.formats import Scheme
from sinterlm.tune.attention import AttentionCut, AttentionTask
from sinterlm.tune.catalogue import AnyTask, Sizes, tasks_of
from sinterlm.tune.gemm import GemmCut, GemmTask
from sinterlm.tune.tasks import Cut, Trial
from sinterlm.tune.timer import Timing, TrialFailed, WorkerTimer
from sinterlm.tune.worker import time_job
from tests.gpu.models import tiny
from tests.gpu.recording import RecordingDriver

GEMMS = ("norm_qkv_rope_kv", "o_residual", "norm_gate_up_act", "down_residual",
         "norm_lm_head_sample")  # fmt: skip
SMALL = Sizes((1, 3), (17, 100), (5, 70))


def all_tasks(
    device: str = "gfx942", ops: Sequence[str] = (), sizes: Sizes = SMALL,
    model: str = "llama-tied", scheme: Scheme | None = None, kv_fp8: bool = False,
) -> list[AnyTask]:  # fmt: skip
    """Of a tiny model."""
    plan = tiny(model, device, scheme, kv_fp8=kv_fp8).plan
    return tasks_of(plan, DEVICES[device], read_tiles(device), ops, sizes)


def tasks(
    device: str = "gfx942", ops: Sequence[str] = GEMMS, sizes: Sequence[int] = (1, 16, 64, 100),
    model: str = "llama-tied", scheme: Scheme | None = None,
) -> list[GemmTask]:  # fmt: skip
    """The GEMMs among them."""
    found = all_tasks(device, ops, replace(SMALL, batch=tuple(sizes)), model, scheme)
    return [task for task in found if isinstance(task, GemmTask)]


def attention(
    device: str = "gfx942", sizes: Sizes = SMALL, model: str = "llama-tied", kv_fp8: bool = False
) -> list[AttentionTask]:
    """The others."""
    found = all_tasks(device, ["attention"], sizes, model, kv_fp8=kv_fp8)
    return [task for task in found if isinstance(task, AttentionTask)]


def cut_of(kernel: Kernel) -> Cut:
    """Of a kernel of either kind."""
    kind = AttentionCut if kernel.name == "attention" else GemmCut
    return kind.of(kernel)


def no_code(kernels: Sequence[Kernel]) -> list[Object | str]:
    """A compiler that takes everything."""
    return [Object(kernel, b"", {}) for kernel in kernels]


@dataclass
class ScriptedTimer:
    """Says what ``takes`` does of each candidate; a text is how it failed."""

    takes: Callable[[Kernel, int], float | str]
    device: str = "scripted"
    asked: list[Cut] = field(default_factory=list)

    def time(self, trial: Trial, made: Sequence[Object]) -> Timing:
        """See ``Timer``."""
        samples = []
        for step, _ in trial.steps:
            us = self.takes(trial.table.kernels[0], step.tokens)
            if isinstance(us, str):
                raise TrialFailed(us)
            samples.append([us + 5, us, us - 0.5])  # the first one is an outlier
        if trial.steps:
            self.asked.append(cut_of(trial.table.kernels[0]))
        return Timing(self.device, "driver 1", samples)

    def __enter__(self) -> ScriptedTimer:
        return self

    def __exit__(self, *_: object) -> None: ...


class DriverTimer(WorkerTimer):
    """What a worker does, in this process, on a driver of no device."""

    def __init__(self, host: bytes, limit_s: float, driver: RecordingDriver) -> None:
        super().__init__(host, limit_s)
        self.driver = driver

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        table, objects = read_archive(archive_of(Path(job["library"]).read_bytes()))
        driver = self.driver
        driver.table, driver.kernels = table, [(o.kernel, o.code) for o in objects]
        driver.position, driver.bound = 0, {}
        return time_job(job)
