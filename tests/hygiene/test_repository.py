"""The repository keeps its own rules: sizes, docstrings, names of commands, variables and paths."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from sinterlm import __version__
from sinterlm.artifact.env import VARIABLES
from tests.conftest import ROOT

MAX_LINES = 400
CODE_SUFFIXES = {".py", ".h", ".cpp", ".js", ".ts"}
TEXT_SUFFIXES = CODE_SUFFIXES | {".md", ".toml", ".yaml", ".json", ".txt", ".sh", ""}


def repository_files() -> list[Path]:
    """Tracked and new files that git does not ignore; all of them where there is no git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        names = [name for name in done.stdout.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        parts = ("src", "tests", "docs", "examples", "scripts")
        found = [p for part in parts for p in (ROOT / part).rglob("*")]
        found = [p for p in found if "__pycache__" not in p.parts]
        names = [str(p.relative_to(ROOT)) for p in (*ROOT.iterdir(), *found)]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


FILES = repository_files()
PYTHON = [path for path in FILES if path.suffix == ".py"]
LIBRARY = [path for path in PYTHON if path.is_relative_to(ROOT / "src")]


def test_there_is_something_to_check() -> None:
    assert len(LIBRARY) > 30
    assert ROOT / "Makefile" in FILES


def test_files_stay_short() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for path in FILES
        if path.suffix in CODE_SUFFIXES
        and (count := len(path.read_text(encoding="utf-8").splitlines())) >= MAX_LINES
    }
    assert not long, f"split along a seam that has a name: {long}"


def test_modules_say_what_they_are_for() -> None:
    bad = []
    for path in PYTHON:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstring = ast.get_docstring(tree)
        if tree.body and (docstring is None or len(docstring.splitlines()) > 16):
            bad.append(str(path.relative_to(ROOT)))
    assert not bad, f"module docstring missing or an essay: {bad}"


def public_definitions(tree: ast.Module) -> list[ast.AST]:
    """Public functions and classes of a module, and public methods of its public classes."""
    found: list[ast.AST] = []
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            found.append(node)
            if isinstance(node, ast.ClassDef):
                found += [
                    n for n in node.body if isinstance(n, kinds) and not n.name.startswith("_")
                ]
    return found


def test_public_names_have_docstrings() -> None:
    bad = []
    for path in LIBRARY:
        for node in public_definitions(ast.parse(path.read_text(encoding="utf-8"))):
            assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if ast.get_docstring(node) is None:
                bad.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not bad, bad


def test_no_absolute_paths_of_one_machine() -> None:
    # Written so that this file does not match itself.
    forbidden = re.compile(
        "|".join(("/ro" + "ot/", "/ho" + "me/[a-z]", "/wo" + "rk/", "/op" + "t/"))
    )
    bad = []
    for path in FILES:
        if path.suffix not in TEXT_SUFFIXES or "goldens" in path.parts:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if forbidden.search(line):
                bad.append(f"{path.relative_to(ROOT)}:{number} {line.strip()[:80]}")
    assert not bad, bad


def test_nothing_is_left_undone() -> None:
    marks = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|NotImplemented" + r"Error)\b")
    bad = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in FILES
        if path.suffix in CODE_SUFFIXES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if marks.search(line)
    ]
    assert not bad, bad


def test_every_environment_variable_is_documented() -> None:
    used: dict[str, str] = {}
    for path in LIBRARY:
        for match in re.finditer(r"SINTERLM_[A-Z0-9_]+", path.read_text(encoding="utf-8")):
            if not match[0].endswith("_"):
                used.setdefault(match[0], str(path.relative_to(ROOT)))
    for path in (p for p in FILES if p.suffix == ".h"):
        for match in re.finditer(r'getenv\("(SINTERLM_\w+)"', path.read_text(encoding="utf-8")):
            used.setdefault(match[1], str(path.relative_to(ROOT)))
    # Named in prose as what Kubernetes injects, never read.
    injected = {name for name in used if re.search(r"_(SERVICE_HOST|PORT(_\d+_TCP)?)$", name)}
    unknown = {name: where for name, where in used.items() if name not in VARIABLES}
    assert set(unknown) <= injected, f"add them to artifact.env.VARIABLES: {unknown}"


def test_every_documented_variable_is_read() -> None:
    table = ROOT / "src/sinterlm/artifact/env.py"
    headers = [p for p in FILES if p.suffix == ".h"]
    text = "".join(p.read_text(encoding="utf-8") for p in [*LIBRARY, *headers] if p != table)
    unread = [name for name in VARIABLES if f'"{name}"' not in text]
    assert not unread, f"documented, and nothing reads them: {unread}"


def test_changelog_has_this_version() -> None:
    headings = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert __version__ in headings


def makefile_targets() -> set[str]:
    """Names before a colon at the start of a line."""
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_makefile_declares_its_targets_phony() -> None:
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    phony = set(re.search(r"^\.PHONY:(.*)$", text, re.MULTILINE)[1].split())  # type: ignore[index]
    assert makefile_targets() == phony
    assert {"setup", "check", "test", "test-all", "demo", "dist", "goldens"} <= phony


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "SECURITY.md"])
def test_make_commands_in_prose_exist(name: str) -> None:
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)\b(?=[`\s#]|$)", _code_of(ROOT / name)))
    assert named <= makefile_targets(), named - makefile_targets()


def test_readme_names_the_two_commands() -> None:
    code = _code_of(ROOT / "README.md")
    assert "make demo" in code
    assert "make test" in code


def _code_of(path: Path) -> str:
    """The code of a Markdown file: fenced blocks and `spans`."""
    text = path.read_text(encoding="utf-8")
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return "\n".join(fenced + spans)


def test_relative_links_in_prose_lead_somewhere() -> None:
    bad = []
    for path in (p for p in FILES if p.suffix == ".md"):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
            if "://" not in target and not (path.parent / target).exists():
                bad.append(f"{path.relative_to(ROOT)} -> {target}")
    assert not bad, bad


def test_ci_runs_check_then_test() -> None:
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert [line for line in lines if line.startswith("make")] == ["make check", "make test"]
