"""A damaged or foreign checkpoint is refused in one message before anything is compiled."""

from __future__ import annotations

from pathlib import Path

import pytest

from sinterlm import cli
from tests.e2e.damage import DAMAGES
from tests.e2e.support import assert_refused, copy_model, environment, run_cli

BASE = "llama-llama3-gqa4"


def _refusal(model: Path | str, cache: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """stderr of ``sinterlm compile MODEL``, which must exit with 2."""
    code = cli.main(["compile", str(model), "--cache-dir", str(cache)])
    told = capsys.readouterr().err
    assert code == 2, told
    assert "Traceback" not in told and "internal error" not in told, told
    assert sum(line.startswith("sinterlm: error:") for line in told.splitlines()) == 1, told
    return told


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoint(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_compiler: None
) -> None:
    damage, words = DAMAGES[name]
    folder = copy_model(BASE, tmp_path)
    damage(folder)
    told = _refusal(folder, tmp_path / "cache", capsys)
    for word in words:
        assert word.lower() in told.lower(), f"{word!r} is not in: {told}"
    assert "no C++ compiler" not in told, told


def test_model_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    told = _refusal(tmp_path / "nowhere", tmp_path / "cache", capsys)
    assert "nowhere" in told


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 16])
def test_damaged_gguf(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_compiler: None
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert "model.gguf" in _refusal(path, tmp_path / "cache", capsys)


def test_damaged_tokenizer(tmp_path: Path, cache_dir: Path) -> None:
    folder = copy_model("qwen3-qknorm", tmp_path)
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:1000])
    done = run_cli("run", folder, "--prompt", "hi", env=environment(cache_dir))
    assert_refused(done, "tokenizer.json")
