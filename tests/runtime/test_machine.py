"""CPUs and memory as cgroups of both versions grant them, read from made-up /proc and /sys."""

from __future__ import annotations

from pathlib import Path

import pytest

from sinterlm.runtime.machine import read_machine

GB = 1 << 30
NO_LIMIT_V1 = "9223372036854771712"


def tree(root: Path, files: dict[str, str]) -> Path:
    base = {"proc/meminfo": "MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable: 8388608 kB\n"}
    for name, text in {**base, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


CPUS = tuple(range(8))


def test_without_cgroups_the_machine_is_ours(tmp_path: Path) -> None:
    machine = read_machine(tree(tmp_path, {}), CPUS)
    assert (machine.num_cpus, machine.cpu_quota) == (8, None)
    assert (machine.memory_available, machine.memory_limit) == (8 * GB, 16 * GB)


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8)],
)
def test_v2_cpu_quota(tmp_path: Path, quota: str, expected: int) -> None:
    root = tree(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": quota})
    assert read_machine(root, CPUS).num_cpus == expected


def test_v2_memory_without_cache_that_can_be_dropped(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/",
        "sys/fs/cgroup/memory.max": str(4 * GB),
        "sys/fs/cgroup/memory.high": "max",
        "sys/fs/cgroup/memory.current": str(3 * GB),
        "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {2 * GB}\nactive_file 7",
    }
    machine = read_machine(tree(tmp_path, files), CPUS)
    assert (machine.memory_available, machine.memory_limit) == (3 * GB, 4 * GB)


def test_the_tightest_ancestor_counts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/kubepods/pod1/box",
        "sys/fs/cgroup/kubepods/pod1/box/memory.max": "max",
        "sys/fs/cgroup/kubepods/pod1/box/memory.current": str(GB),
        "sys/fs/cgroup/kubepods/pod1/box/cpu.max": "max 100000",
        "sys/fs/cgroup/kubepods/pod1/memory.max": str(2 * GB),
        "sys/fs/cgroup/kubepods/pod1/memory.current": str(GB),
        "sys/fs/cgroup/kubepods/pod1/cpu.max": "300000 100000",
    }
    machine = read_machine(tree(tmp_path, files), CPUS)
    assert (machine.memory_available, machine.num_cpus) == (GB, 3)


def test_v1_limits(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/ignored",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2 * GB),
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(GB),
        "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GB // 2}",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
    }
    machine = read_machine(tree(tmp_path, files), CPUS)
    assert (machine.memory_available, machine.num_cpus) == (3 * GB // 2, 2)


def test_v1_without_limits(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:memory:/\n1:cpu:/",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": NO_LIMIT_V1,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(GB),
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
    }
    machine = read_machine(tree(tmp_path, files), CPUS)
    assert (machine.memory_limit, machine.cpu_quota) == (16 * GB, None)


def test_a_full_cgroup_leaves_nothing(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/",
        "sys/fs/cgroup/memory.max": str(GB),
        "sys/fs/cgroup/memory.current": str(2 * GB),
    }
    assert read_machine(tree(tmp_path, files), CPUS).memory_available == 0


def test_nonsense_is_no_limit(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/../..\nrubbish\n5:memory",
        "sys/fs/cgroup/memory.max": "lots",
        "sys/fs/cgroup/cpu.max": "100000 0",
    }
    assert read_machine(tree(tmp_path, files), CPUS).num_cpus == 8


def test_here(tmp_path: Path) -> None:
    machine = read_machine()
    assert 1 <= machine.num_cpus <= len(machine.cpu_ids)
    assert 0 < machine.memory_available <= machine.memory_limit
