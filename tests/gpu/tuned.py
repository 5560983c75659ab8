"""A tiny model's tasks, and timers that need no device, for tests of ``sinterlm tune``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sinterlm.backends.gpu.devices import DEVICES
from sinterlm.backends.gpu.library import archive_of
from sinterlm.backends.gpu.objects import Object, read_archive
from sinterlm.backends.gpu.table import Kernel
from sinterlm.backends.gpu.tuning import read_tiles
from sinterlm.passes.formats import Scheme
from sinterlm.tune.candidates import Cut
from sinterlm.tune.tasks import Task, Trial, tasks_of
from sinterlm.tune.timer import Timing, TrialFailed, WorkerTimer
from sinterlm.tune.worker import time_job
from tests.gpu.models import tiny
from tests.gpu.recording import RecordingDriver


def tasks(
    device: str = "gfx942", ops: Sequence[str] = (), sizes: Sequence[int] = (1, 16, 64, 100),
    model: str = "llama-tied", scheme: Scheme | None = None,
) -> list[Task]:  # fmt: skip
    """Of a tiny model."""
    plan = tiny(model, device, scheme).plan
    return tasks_of(plan, DEVICES[device], read_tiles(device), ops, sizes)


def no_code(kernels: Sequence[Kernel]) -> list[Object | str]:
    """A compiler that takes everything."""
    return [Object(kernel, b"", {}) for kernel in kernels]


@dataclass
class ScriptedTimer:
    """Says what ``takes`` does of each candidate; a text is how it failed."""

    takes: Callable[[Kernel, int], float | str]
    device: str = "scripted"
    asked: list[Cut] = field(default_factory=list)

    def time(
        self, trial: Trial, made: Sequence[Object], steps: Sequence[tuple[int, int]]
    ) -> Timing:
        """See ``Timer``."""
        samples = []
        for tokens, _ in steps:
            us = self.takes(trial.table.kernels[0], tokens)
            if isinstance(us, str):
                raise TrialFailed(us)
            samples.append([us + 5, us, us - 0.5])  # the first one is an outlier
        if steps:
            self.asked.append(Cut.of(trial.table.kernels[0]))
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
