"""``sinterlm vllm serve``: OpenAI's clients unchanged against vLLM with SinterLM inside. Slow."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.plugin.conftest import vllm_environment

pytestmark = pytest.mark.slow
START_S = 600
FLAGS = (
    "--served-model-name", "tiny", "--dtype", "bfloat16", "--max-model-len", "512",
    "--max-num-seqs", "16", "--kv-cache-memory-bytes", str(64 << 20),
    "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
)  # fmt: skip


@pytest.fixture
def url(
    python: Path, beside: Path, model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[str]:
    """A server on a free port, with the flags of the test's parameter."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "log"
    command = [python, "-m", "sinterlm", "vllm", "serve", model, "--port", str(port), *FLAGS]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, *request.param], stdout=out, stderr=out,
            env=vllm_environment(python, beside, SINTERLM_VLLM="require"),
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(START_S):
            assert process.poll() is None, log.read_text()[-3000:]
            if is_healthy(url):
                break
            time.sleep(1)
        assert "SinterLM runs this model" in log.read_text()
        yield url
    finally:
        process.terminate()
        process.wait(60)


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, TimeoutError):
        return False


NGRAM = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}'


@pytest.mark.parametrize(
    "url", [(), ("--speculative-config", NGRAM)], ids=["plain", "ngram"], indirect=True
)
def test_clients(url: str, tmp_path: Path) -> None:
    """Streams, logprobs and JSON schemas; and the steps that were ours are counted."""
    clients = tmp_path / "clients/bin/python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "clients"], check=True)
    install = [clients, "-m", "pip", "-qq", "install", "openai", "langchain-openai"]
    subprocess.run(install, check=True)
    # The server is vLLM's: it shows no single model, draws no n greedy answers, names no field, and
    # its grammar of a required tool lets this model's arguments be a string, with stock as well.
    other = ("models", "completions", "errors", "tools")
    script = [clients, ROOT / "scripts/check_clients.py", f"{url}/v1", "tiny", *other]
    done = subprocess.run(script, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == 6
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        metrics = answer.read().decode()
    steps = next(line for line in metrics.splitlines() if line.startswith("sinterlm_steps_total"))
    assert float(steps.split()[-1]) > 20
