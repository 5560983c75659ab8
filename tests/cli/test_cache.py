"""``sinterlm cache``: lists what compiling left, finds damage, makes room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sinterlm import cli
from tests.conftest import ROOT

MODEL = str(ROOT / "tests/goldens/models/llama-tied-mha")


def call(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    assert cli.main([*words, "--json"]) == code
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def test_life_of_a_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--cache-dir", str(tmp_path))
    made = call(capsys, "compile", MODEL, "--isa", "generic", *where)
    assert made["seconds"] > 0
    listed = call(capsys, "cache", "ls", *where)
    assert sorted(entry["kind"] for entry in listed["entries"]) == ["bundles", "code", "weights"]
    assert listed["bytes"] >= made["library_bytes"] + made["weights_bytes"]
    assert call(capsys, "cache", "verify", *where) == {"checked": 3, "problems": []}

    library = next((tmp_path / "code").glob("*/model.so"))
    library.chmod(0o644)
    library.write_bytes(library.read_bytes()[:-1] + b"?")
    problems = call(capsys, "cache", "verify", *where, code=1)["problems"]
    assert problems[0]["kind"] == "code"

    call(capsys, "cache", "prune", *where)
    assert len(call(capsys, "cache", "ls", *where)["entries"]) == 3
    removed = call(capsys, "cache", "prune", "--all", *where)["removed"]
    assert len(removed) == 3
    assert call(capsys, "cache", "ls", *where)["entries"] == []


def test_words_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--cache-dir", str(tmp_path / "new"))
    assert cli.main(["cache", "ls", *where]) == 0
    assert "is empty" in capsys.readouterr().out
    assert cli.main(["compile", MODEL, "--isa", "generic", *where]) == 0
    assert "sha256" in capsys.readouterr().out
    assert cli.main(["cache", "ls", *where]) == 0
    assert "llama-tied-mha" in capsys.readouterr().out
    assert cli.main(["compile", MODEL, "--isa", "generic", "--code-only", *where]) == 0
    assert "run it with" not in capsys.readouterr().err, "code alone does not run"
    assert cli.main(["cache", "verify", *where]) == 0
    assert "4 entries checked, 0 damaged" in capsys.readouterr().out


def test_output_is_a_bundle_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bundle"
    where = ("--cache-dir", str(tmp_path / "cache"))
    made = call(capsys, "compile", MODEL, "--isa", "generic", "-o", str(out), *where)
    assert made["bundle"] == str(out)
    call(capsys, "cache", "prune", "--all", *where)
    pinned = ("--bundle-sha256", made["bundle_sha256"])
    line = ("run", str(out), "--prompt", "a", "--max-tokens", "2", *pinned, *where)
    assert call(capsys, *line)["usage"]["completion_tokens"] == 2
    assert cli.main([*line[:-3], "0" * 64]) == 2
    assert "--bundle-sha256" in capsys.readouterr().err
    assert cli.main(["compile", str(out), "--max-model-len", "7", *where]) == 2
    assert "--max-model-len 7" in capsys.readouterr().err


def test_a_file_is_no_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for action in ("ls", "prune", "verify"):
        assert cli.main(["cache", action, "--cache-dir", str(tmp_path / "file")]) == 2
        assert "is a file" in capsys.readouterr().err


def test_json_is_ascii_whatever_the_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ("run", MODEL, "--prompt", "hi", "--max-tokens", "8", "--temperature", "0", "--json")
    assert cli.main([*line, "--isa", "generic", "--cache-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.isascii() and not json.loads(out)["text"].isascii()
