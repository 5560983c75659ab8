"""What was measured, one JSON object a line, written as soon as it is known: a run that was cut
off, or ended by its time limit, goes on where it stopped. A line that is cut off does not count.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

#: refused: it did not compile, or its object is not usable; failed: the device did not survive it,
#: or it took too long.
State = Literal["measured", "refused", "failed"]


@dataclass(frozen=True)
class Result:
    """How one candidate did."""

    key: str  #: of all that decides what was measured
    task: str
    state: State
    cut: dict[str, int]  #: for people
    #: Microseconds, by what the step is called.
    samples: dict[str, list[float]] = field(default_factory=dict)
    why: str = ""
    device: str = ""  #: as its driver calls it
    driver: str = ""
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    @property
    def us(self) -> dict[str, float]:
        """Median microseconds by step."""
        return {label: statistics.median(times) for label, times in self.samples.items()}

    @property
    def cost_us(self) -> float:
        """What a candidate is chosen by: the geometric mean over its steps, so that none counts for
        more because it takes longer."""
        return statistics.geometric_mean(self.us.values())


class Journal:
    """The results in a file that were measured on ``device``, and new ones."""

    def __init__(self, path: Path, device: str) -> None:
        """Read ``path``, which need not exist. Raises OSError."""
        self.path, self._device = path, device
        self._found = {r.key: r for r in _read(path) if r.device == device}

    def __len__(self) -> int:
        return len(self._found)

    def find(self, key: str) -> Result | None:
        """The result under a key."""
        return self._found.get(key)

    def add(self, result: Result) -> None:
        """Keep a result; it is on disk when this returns. Raises OSError."""
        self._found[result.key] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.write(b"\n")  # behind a line that was cut off
            file.write(json.dumps(asdict(result)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _read(path: Path) -> Iterator[Result]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            data: dict[str, Any] = json.loads(line)
            yield Result(**data)
        except (ValueError, TypeError):
            continue
