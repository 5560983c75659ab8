"""One compiled demo model for all command-line tests, through the session's cache."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

QUESTION = "Name the planets of the solar system in order."


def sinterlm(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "sinterlm.cli", *words],
        capture_output=True, text=True, input=stdin, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="session")
def compiled(test_environment: Path) -> dict[str, Any]:
    """What ``sinterlm compile smollm2 --json`` said."""
    done = sinterlm("compile", "smollm2", "--json")
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts
