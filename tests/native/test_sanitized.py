"""A whole model's library under ASan + UBSan and under TSan, in a Python of its own."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from sinterlm.backends.cxx.toolchain import find_compiler
from sinterlm.options import IsaName
from tests.libraries import BuildLibrary
from tests.native.conftest import HERE
from tests.native.tiny import build_tiny

ROOT = HERE.parents[1]


def runtime_library(name: str) -> str:
    """Path of a sanitizer's runtime, which must come before all else in the process."""
    command = [*find_compiler().command, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(path):
        pytest.skip(f"the compiler brings no {name}")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind,runtime", [("address,undefined", "libasan.so"), ("thread", "libtsan.so")]
)
@pytest.mark.parametrize(
    "name,dtype",
    [("odd-everything", "bf16"), ("gqa3-tied-window", "fp32"), ("gqa3-tied-window", "fp32+kv8")],
)
def test_model(
    tmp_path: Path,
    build_library: BuildLibrary,
    isa: IsaName,
    kind: str,
    runtime: str,
    name: str,
    dtype: str,
) -> None:
    flags = (f"-fsanitize={kind}", "-fno-sanitize-recover=all", "-g")
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime_library(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",  # of the interpreter, which is not ours
        "PYTHONPATH": str(ROOT),
    }
    pickled = tmp_path / "tiny.pickle"
    pickled.write_bytes(pickle.dumps(build_tiny(name, dtype, isa, tmp_path, build_library, flags)))
    command = [sys.executable, str(HERE / "sanitized_model.py"), str(pickled)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout == "done\n", (done.stdout + done.stderr)[-4000:]
