"""Proof that our code ran: counters that the worker writes and the API server shows at /metrics.

vLLM's worker and its API server are different processes, so the counters lie in a small file that
both map; the first process makes it and names it in the environment, which the others inherit.
"""

from __future__ import annotations

import atexit
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np

_FILE = "SINTERLM_VLLM_COUNTERS"
NAMES = {
    "steps": "Steps of the model that ran in SinterLM",
    "tokens": "Tokens that went through SinterLM",
    "nanoseconds": "Time inside SinterLM's library",
}


class Counters:
    """Counters by name; of this process alone where no file is shared."""

    def __init__(self, path: str | None) -> None:
        """Map ``path``, made by ``share_counters``."""
        if path is None:
            self._values = np.zeros(len(NAMES), np.int64)
            return
        with open(path, "r+b") as file:
            self._values = np.frombuffer(mmap.mmap(file.fileno(), 8 * len(NAMES)), np.int64)

    def add(self, steps: int, tokens: int, nanoseconds: int) -> None:
        """Count; one process writes."""
        self._values += (steps, tokens, nanoseconds)

    def read(self) -> dict[str, int]:
        """All of them now."""
        return dict(zip(NAMES, self._values.tolist(), strict=True))


def open_counters(*, is_writer: bool = True) -> Counters:
    """The counters of this vLLM; of this process alone where another one writes."""
    return Counters(os.environ.get(_FILE) if is_writer else None)


def share_counters() -> None:
    """Make the file if nobody has, and show the counters in this process's Prometheus registry."""
    if _FILE in os.environ:
        return
    descriptor, path = tempfile.mkstemp(prefix="sinterlm-vllm-")
    os.write(descriptor, bytes(8 * len(NAMES)))
    os.close(descriptor)
    os.environ[_FILE] = path
    atexit.register(_remove, path, os.getpid())
    from prometheus_client import REGISTRY

    REGISTRY.register(_Collector(Counters(path)))


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner:
        with suppress(OSError):
            os.unlink(path)


class _Collector:
    """Prometheus's view of the counters."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters

    def collect(self) -> Iterator[Any]:
        """One family for each counter; seconds where it counts time."""
        from prometheus_client.core import CounterMetricFamily

        for name, value in self._counters.read().items():
            text = NAMES[name]
            if name == "nanoseconds":
                yield CounterMetricFamily("sinterlm_step_seconds", text, value / 1e9)
            else:
                yield CounterMetricFamily(f"sinterlm_{name}", text, value)
