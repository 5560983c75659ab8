"""Our client and vLLM's, against one server: slow, and only where vLLM is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sinterlm.commands.bench.make_checkpoint import make_checkpoint
from tests.conftest import ROOT


def vllm_python() -> Path | None:
    """Of $BENCH_VLLM_PYTHON, else of an environment of `make bench-setup`."""
    named = os.environ.get("BENCH_VLLM_PYTHON")
    found = [Path(named)] if named else sorted(ROOT.glob("build/bench/engines/vllm*/bin/python"))
    return found[0] if found else None


@pytest.mark.slow
def test_the_two_clients_agree(tmp_path: Path) -> None:
    python = vllm_python()
    if python is None:
        pytest.skip("no vLLM: run `make bench-setup`, or name its interpreter in BENCH_VLLM_PYTHON")
    (folder,) = make_checkpoint("smollm2", tmp_path, ("safetensors",))
    command = [sys.executable, str(ROOT / "scripts/bench_parity.py"), "--vllm-python", str(python),
               "--tokenizer", str(folder)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
