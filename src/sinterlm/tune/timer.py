"""Has candidates timed by a worker process, and starts another one when it is lost."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from sinterlm.backends.gpu.library import join
from sinterlm.backends.gpu.objects import Object, archive
from sinterlm.errors import ResourceError
from sinterlm.tune.tasks import Trial

_COMMAND = (sys.executable, "-m", "sinterlm.tune.worker")


@dataclass(frozen=True)
class Timing:
    """What the device said: microseconds of each sample, a list per step."""

    device: str
    driver: str
    samples: list[list[float]]


class TrialFailed(Exception):
    """The device, or its driver, did not survive a candidate, or it took too long."""


class Timer(Protocol):
    """Times candidates."""

    def time(self, trial: Trial, made: Sequence[Object]) -> Timing:
        """``trial`` with its code objects, in each of its steps. Raises TrialFailed, also where
        its results are not those of the first of the task, and ResourceError where no candidate
        could be timed."""
        ...


class WorkerTimer:
    """A ``Timer`` by a process. ``limit_s`` is how long a candidate may take, in seconds."""

    def __init__(
        self, host: bytes, limit_s: float = 60, command: Sequence[str] = _COMMAND
    ) -> None:  # fmt: skip
        self._host, self._limit_s, self._command = host, limit_s, command
        self._folder = tempfile.TemporaryDirectory(prefix="sinterlm-tune-")
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._number = 0
        self._has_worked = False

    def __enter__(self) -> WorkerTimer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()
        self._folder.cleanup()

    def time(self, trial: Trial, made: Sequence[Object]) -> Timing:
        """See ``Timer``."""
        self._number += 1  # a name that the process has not loaded yet
        path = Path(self._folder.name) / f"trial-{self._number}.so"
        kernels = trial.table.kernels
        objects = [replace(o, kernel=k) for o, k in zip(made, kernels, strict=True)]
        path.write_bytes(join(self._host, archive(trial.table.to_text(), objects)))
        reference = Path(self._folder.name) / f"{trial.task}.npz"
        steps = [{"step": asdict(step), "train": asdict(train)} for step, train in trial.steps]
        job = {"library": str(path), "steps": steps, "pages": trial.pages,
               "reference": str(reference), "outputs": trial.outputs,
               "checked_rows": trial.checked_rows}  # fmt: skip
        try:
            answer = self._ask(job)
        finally:
            path.unlink()
        if "error" in answer:
            self._end()  # its device may be lost to it
            # What the first candidate meets every other would meet, too.
            if answer["is_setup"] and not self._has_worked:
                raise ResourceError(answer["error"])
            raise TrialFailed(answer["error"])
        self._has_worked = self._has_worked or bool(trial.steps)
        return Timing(answer["device"], answer["driver"], answer["samples"])

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        process = self._process if self._process is not None else self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            line = self._answers.get(timeout=self._limit_s)
        except queue.Empty:
            self._end()
            raise TrialFailed(f"not done within {self._limit_s:.0f} s") from None
        except OSError:
            line = ""
        if not line:
            process.wait()
            said, code = self._log().strip().splitlines(), process.returncode
            self._end()
            raise TrialFailed(f"its process ended with {code}: {(said or ['it said nothing'])[-1]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start(self) -> subprocess.Popen[str]:
        log = Path(self._folder.name) / "log"
        with log.open("w") as out:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, text=True
            )
        self._answers = queue.Queue()
        threading.Thread(
            target=_forward, args=(self._process.stdout, self._answers), daemon=True
        ).start()
        return self._process

    def _log(self) -> str:
        return (Path(self._folder.name) / "log").read_text(errors="replace")

    def _end(self) -> None:
        """Stop the process. One that a device holds is killed, and waited for no longer than it
        takes the system to say that it cannot be."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)


def _forward(lines: Any, to: queue.Queue[str]) -> None:
    """Every line of a pipe, and "" at its end."""
    for line in lines:
        to.put(line)
    to.put("")
