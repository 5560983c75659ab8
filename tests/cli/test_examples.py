"""Every example runs as its first line says, and stays short."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
#: What each example's output must contain.
EXPECTED = {
    "batch_invariance.py": r"bit-identical",
    "chat.py": r"Paris",
    "generate.py": r"The capital of Italy is\|",
    "logits.py": r"perplexity \d",
}


def test_every_example_has_an_expectation() -> None:
    assert {path.name for path in EXAMPLES} == set(EXPECTED)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 40
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(EXPECTED[path.name], done.stdout), done.stdout
