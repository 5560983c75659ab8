"""The import contracts hold, and break when somebody crosses a line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the package under ``folder/src`` with the project's contracts."""
    return subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()",
         "--config", str(ROOT / "pyproject.toml"), "--no-cache"],
        cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(folder / "src")},
    )  # fmt: skip


def test_contracts_hold() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("ir/graph.py", "import sinterlm.passes"),
        ("passes/__init__.py", "import sinterlm.frontend"),
        ("backends/base.py", "import sinterlm.engine"),
        ("runtime/batch.py", "import sinterlm.compile"),
        ("engine/engine.py", "import sinterlm.ir.graph"),
        ("artifact/text.py", "import numpy"),
        ("ir/graph.py", "import gguf"),
        ("engine/engine.py", "import jinja2"),
        ("engine/engine.py", "import llguidance"),
        ("compile.py", "import rich"),
        ("engine/engine.py", "import sinterlm.serve.bridge"),
        ("bench/results.py", "import sinterlm.serve.bridge"),
        ("serve/bridge.py", "import sinterlm.compile"),
    ],
)
def test_crossing_a_line_is_seen(tmp_path: Path, module: str, statement: str) -> None:
    package = tmp_path / "src/sinterlm"
    shutil.copytree(
        ROOT / "src/sinterlm", package, ignore=shutil.ignore_patterns("__pycache__", "*.h")
    )
    with (package / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{statement}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout
