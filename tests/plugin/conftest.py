"""An installed vLLM, and SinterLM beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def vllm_environment(python: Path, beside: Path, **variables: str) -> dict[str, str]:
    """Variables for a process of that vLLM, SinterLM being importable from ``beside``."""
    openmp = python.parents[1] / "lib/libiomp5.so"
    preload = {"LD_PRELOAD": str(openmp)} if openmp.exists() else {}
    return {
        **os.environ, "PYTHONPATH": str(beside), "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", **preload, **variables,
    }  # fmt: skip


@pytest.fixture(scope="module")
def python() -> Path:
    engines = Path(os.environ.get("ENGINES_DIR") or ROOT / "build/bench/engines")
    python = engines / "vllm/bin/python"
    if not python.exists():
        pytest.skip(f"vLLM is not installed in {engines}: make bench-setup does")
    return python


@pytest.fixture(scope="module")
def beside(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SinterLM installed beside that vLLM, which itself stays as it is."""
    target = tmp_path_factory.mktemp("beside")
    pip = [python, "-m", "pip", "install", "-q", "--no-deps", "--target", target]
    subprocess.run([*pip, ROOT, "gguf"], check=True)
    return target


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as a Hugging Face folder."""
    made = tmp_path_factory.mktemp("weights")
    command = [sys.executable, "-m", "sinterlm", "bench", "make-checkpoint", "smollm2"]
    subprocess.run([*command, "--output", made], check=True)
    return made / "hf"
