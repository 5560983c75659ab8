"""The worker pool, as a program of its own: phases, sleeping, float state, names, shutdown."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sinterlm.backends.cxx.toolchain import INCLUDE_DIRS, find_compiler
from tests.native.conftest import HERE


def build_and_run(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    includes = [f"-I{path}" for path in INCLUDE_DIRS]
    command = [*find_compiler().command, "-std=c++17", "-ffp-contract=off", "-pthread", *flags]
    source = str(HERE / "threads_check.cpp")
    subprocess.run([*command, *includes, source, "-o", "check"], cwd=tmp_path, check=True)
    return subprocess.run([tmp_path / "check"], capture_output=True, text=True, timeout=120)


def test_pool(tmp_path: Path) -> None:
    done = build_and_run(tmp_path, "-O2", "-Wall", "-Wextra", "-Werror")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["thread", "address,undefined"])
def test_pool_under_a_sanitizer(tmp_path: Path, kind: str) -> None:
    done = build_and_run(tmp_path, "-O1", "-g", f"-fsanitize={kind}", "-fno-sanitize-recover=all")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
