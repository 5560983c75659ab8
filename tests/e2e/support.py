"""What the end-to-end tests share: the goldens as data, and how a command line is run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"
MODELS = GOLDENS / "models"

#: Run by default; together they hold every rope but two, GQA 2, 4 and 7, tied and untied heads,
#: biases, per-head norms, a sliding window, shards, and both spellings of config.json.
QUICK = ("llama-llama3-gqa4", "mistral-window", "qwen2-yarn-gqa7", "qwen3-qknorm")


@dataclass(frozen=True)
class Golden:
    """One tiny checkpoint and what transformers made of it in float32; lists run over prompts."""

    name: str
    folder: Path
    prompts: list[NDArray[np.int32]]  #: [n]
    logits: list[NDArray[np.float32]]  #: [n, vocab]
    greedy: list[NDArray[np.int32]]  #: [32]
    margins: list[NDArray[np.float32]]  #: [32]

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary."""
        return int(self.logits[0].shape[1])


def all_models() -> tuple[str, ...]:
    """Names of all tiny checkpoints."""
    return tuple(sorted(path.name for path in MODELS.iterdir() if path.is_dir()))


def load_golden(name: str) -> Golden:
    """The golden called ``name``."""
    with np.load(MODELS / name / "expected.npz") as file:
        arrays = dict(file)
    count = sum(key.startswith("prompt_") for key in arrays)

    def column(key: str) -> list[NDArray[np.generic]]:
        return [arrays[f"{key}_{i}"] for i in range(count)]

    return Golden(
        name, MODELS / name, column("prompt"), column("logits"), column("greedy"), column("margin")
    )


def copy_model(name: str, to: Path) -> Path:
    """A writable copy of a tiny checkpoint, without its expected results."""
    return Path(
        shutil.copytree(MODELS / name, to / name, ignore=shutil.ignore_patterns("expected.npz"))
    )


def environment(cache: Path, **changes: str | None) -> dict[str, str]:
    """This process's environment with the cache in ``cache``; None removes a variable."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("SINTERLM_")}
    env["SINTERLM_CACHE_DIR"] = str(cache)
    for key, value in changes.items():
        env.pop(key, None)
        if value is not None:
            env[key] = value
    return env


def command(*args: str | Path) -> list[str]:
    """The argument vector of ``sinterlm`` run by this interpreter."""
    return [sys.executable, "-m", "sinterlm.cli", *map(str, args)]


def run_cli(
    *args: str | Path, env: dict[str, str], timeout: float = 240.0
) -> subprocess.CompletedProcess[str]:
    """Run ``sinterlm`` to its end in a process of its own."""
    return subprocess.run(
        command(*args), env=env, capture_output=True, text=True, timeout=timeout,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2, one message, every word in it, no traceback."""
    told = done.stderr
    assert done.returncode == 2, f"exit {done.returncode}\n{done.stdout}\n{told}"
    assert "Traceback" not in told and "internal error" not in told, told
    assert told.count("error:") >= 1, told
    assert sum(line.startswith("sinterlm: error:") for line in told.splitlines()) <= 1, told
    for word in words:
        assert word.lower() in told.lower(), f"{word!r} is not in: {told}"
