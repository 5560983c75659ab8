"""What this process may use of the machine: CPUs and memory, by affinity and cgroups.

Reads the limits of every cgroup from ours up to the root, v2 and v1, and takes the smallest. The
host's own figures are never trusted alone: in a container they belong to somebody else.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: v1 writes "no limit" as the largest page-aligned signed number; anything near it is none.
_NO_LIMIT = 1 << 60

_CGROUP = "sys/fs/cgroup"


@dataclass(frozen=True)
class Machine:
    """CPUs and memory left to this process."""

    cpu_ids: tuple[int, ...]  #: CPUs the scheduler may put us on
    cpu_quota: float | None  #: CPUs' worth of time the cgroups grant; None = no limit
    memory_available: int  #: bytes that can still be allocated
    memory_limit: int  #: bytes this process may use in all (its cgroup's, else the machine's)

    @property
    def num_cpus(self) -> int:
        """Threads that can run at once: a quota of 2.5 CPUs counts as 2, less than one as 1."""
        if self.cpu_quota is None:
            return len(self.cpu_ids)
        return max(1, min(len(self.cpu_ids), math.floor(self.cpu_quota + 1e-6)))


def read_machine(root: Path = Path("/"), cpu_ids: tuple[int, ...] | None = None) -> Machine:
    """Limits as they stand now. ``root`` is where /proc and /sys are looked for; ``cpu_ids`` None
    = this process's affinity mask."""
    ids = tuple(sorted(os.sched_getaffinity(0))) if cpu_ids is None else cpu_ids
    total, free = _host_memory(root)
    limits = list(_memory_limits(root))
    available = min([free, *(limit - used for limit, used in limits)])
    limit = min([total, *(limit for limit, _ in limits)])
    quotas = list(_cpu_quotas(root))
    return Machine(ids, min(quotas) if quotas else None, max(0, available), limit)


def cpu_name(root: Path = Path("/")) -> str:
    """The processor's name; its architecture where the system does not say."""
    for line in _text(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _host_memory(root: Path) -> tuple[int, int]:
    """(MemTotal, MemAvailable) of /proc/meminfo in bytes."""
    found: dict[str, int] = {}
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if words and words[0].isdigit():
            found[name] = int(words[0]) * 1024
    total = found.get("MemTotal", 0)
    return total, found.get("MemAvailable", found.get("MemFree", total))


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) of each cgroup that limits memory; cache that can be dropped is not "used"."""
    for folder in _cgroup_folders(root, ""):
        limits = [_number(folder / name) for name in ("memory.max", "memory.high")]
        limit = min((n for n in limits if n is not None), default=None)
        used = _number(folder / "memory.current")
        if limit is not None and used is not None:
            yield limit, max(0, used - _stat(folder / "memory.stat", "inactive_file"))
    for folder in _cgroup_folders(root, "memory"):
        limit = _number(folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            yield limit, max(0, used - _stat(folder / "memory.stat", "total_inactive_file"))


def _cpu_quotas(root: Path) -> Iterator[float]:
    """CPUs' worth of time that each limiting cgroup grants."""
    for folder in _cgroup_folders(root, ""):
        words = _text(folder / "cpu.max").split()
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]) > 0:
            yield int(words[0]) / int(words[1])
    for folder in _cgroup_folders(root, "cpu"):
        quota, period = (_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota is not None and period is not None and quota > 0 and period > 0:
            yield quota / period


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """Existing folders of our cgroup and its ancestors, for a v1 controller, or "" for v2.

    Inside a container the path in /proc/self/cgroup may be the host's, of which only the mount's
    own root is visible: that one is always looked at.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if controller == "" and number == "0" and names == "":
            mounts = [root / _CGROUP, root / _CGROUP / "unified"]
        elif controller and controller in names.split(","):
            mounts = [root / _CGROUP / controller, root / _CGROUP / names]
        else:
            continue
        parts = [part for part in path.split("/") if part and part != ".."]
        for mount in mounts:
            for depth in range(len(parts), -1, -1):
                folder = mount.joinpath(*parts[:depth])
                if folder.is_dir():
                    yield folder


def _number(path: Path) -> int | None:
    """A file's whole number; None where it is absent, "max", negative, or no limit at all."""
    text = _text(path).strip()
    return int(text) if text.isdigit() and int(text) < _NO_LIMIT else None


def _stat(path: Path, name: str) -> int:
    """One line of a ``memory.stat``, in bytes; 0 where it is absent."""
    for line in _text(path).splitlines():
        words = line.split()
        if len(words) == 2 and words[0] == name and words[1].isdigit():
            return int(words[1])
    return 0


def _text(path: Path) -> str:
    """Contents of a small file; empty where it cannot be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
