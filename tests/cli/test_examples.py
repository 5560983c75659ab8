"""Every example runs as its first line says, and stays short."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.serve.load.process import running

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
#: What each example's output must contain.
EXPECTED = {
    "batch_invariance.py": r"bit-identical",
    "chat.py": r"Paris",
    "generate.py": r"The capital of Italy is\|",
    "logits.py": r"perplexity \d",
    "serve_chat.py": r"(?s)Paris.*\[\d+ tokens\]",
    "serve_structured.py": r"'city': .*'population': \d",
    "serve_tools.py": r"^weather \{'city': ",
}


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    """The API of a real server, for the examples that are clients."""
    with running("--max-model-len", "1024", "--tool-call-parser", "hermes") as server:
        yield f"http://127.0.0.1:{server.port}/v1"


def test_every_example_has_an_expectation() -> None:
    assert {path.name for path in EXAMPLES} == set(EXPECTED)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path: Path, request: pytest.FixtureRequest) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 40
    is_client = path.name.startswith("serve_")
    arguments = [request.getfixturevalue("server_url")] if is_client else []
    command = [sys.executable, str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(EXPECTED[path.name], done.stdout), done.stdout
