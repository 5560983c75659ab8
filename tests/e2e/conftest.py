"""Fixtures of the end-to-end tests: the cache they share with all other tests, and models in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sinterlm import LLM

OpenModel = Callable[..., LLM]


@pytest.fixture(scope="session")
def cache_dir(test_environment: Path) -> Path:
    """The shared cache."""
    return test_environment


@pytest.fixture
def open_model(cache_dir: Path) -> Iterator[OpenModel]:
    """``LLM`` with the shared cache and one thread; closed after the test."""
    with ExitStack() as opened:

        def open_one(model: str | Path, **options: object) -> LLM:
            options.setdefault("cache_dir", cache_dir)
            options.setdefault("num_threads", 1)
            options.setdefault("kv_cache_memory_bytes", 32 << 20)
            return opened.enter_context(LLM(str(model), **options))  # type: ignore[arg-type]

        yield open_one


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler can be found: whoever gets as far as needing one is told so."""
    empty = tmp_path / "empty-path"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))
    for name in ("SINTERLM_CXX", "CXX"):
        monkeypatch.delenv(name, raising=False)
