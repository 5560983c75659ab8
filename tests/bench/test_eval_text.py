"""The shipped text, its tokens, and windows that score each token once, with a context."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinterlm.artifact.bundle import Bundle
from sinterlm.artifact.text import TextAssets
from sinterlm.bench.eval_text import (
    DEFAULT_WINDOW,
    Layout,
    Tokens,
    lay_out,
    read_text,
    shipped_text,
    tokenise,
)
from sinterlm.engine.tokenizer import Tokenizer
from sinterlm.errors import UsageError
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def tokenizer(tiny: Bundle) -> Tokenizer:
    return Tokenizer(tiny.text())


def test_shipped_text(tokenizer: Tokenizer) -> None:
    text = shipped_text()
    assert 20_000 <= len(text) <= 60_000
    assert text.isascii() and "\r" not in text and "\n\n\n" not in text
    for words in ("It is a truth universally", "best of times", "White Rabbit", "Call me Ishmael",
                  "Four score", "entangled bank"):  # fmt: skip
        assert words in text, words
    assert tokenizer.decode(tokenise(text, tokenizer).ids.tolist()) == text


def test_sources_of_the_shipped_text_are_named() -> None:
    sources = (ROOT / "src/sinterlm/bench/data/SOURCES.md").read_text(encoding="utf-8")
    for author in ("Austen", "Dickens", "Carroll", "Melville", "Thoreau", "Madison", "Darwin"):
        assert author in sources, author


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    num_bos = draw(st.integers(0, 1))
    window = draw(st.integers(2, 40))
    stride = draw(st.integers(1, window - 1))
    return Layout(draw(st.integers(2, 200)), num_bos, window, stride)


@given(layouts())
def test_each_token_is_scored_once_with_a_context(layout: Layout) -> None:
    scored: list[int] = []
    for window in layout.windows():
        scored += range(window.first, window.stop)
        assert window.stop - window.start + layout.num_bos <= layout.window
        assert window.first > window.start or layout.num_bos  # something precedes it
        assert 0 <= window.start <= window.first < window.stop <= layout.num_tokens
    assert scored == list(range(1 - layout.num_bos, layout.num_tokens))
    assert len(scored) == layout.num_scored


@given(layouts())
def test_only_the_last_window_is_short(layout: Layout) -> None:
    *full, last = layout.windows()
    assert all(window.stop - window.start == layout.room for window in full)
    assert last.stop == layout.num_tokens


def test_windows_by_hand() -> None:
    triples = [(w.start, w.first, w.stop) for w in Layout(10, 0, 4, 2).windows()]
    assert triples == [(0, 1, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]
    triples = [(w.start, w.first, w.stop) for w in Layout(5, 1, 4, 3).windows()]
    assert triples == [(0, 0, 3), (3, 3, 5)]


def test_defaults() -> None:
    tokens = Tokens(np.arange(5000, dtype=np.int32), ())
    layout = lay_out(tokens, 8192, None, None)
    assert (layout.window, layout.stride) == (DEFAULT_WINDOW, DEFAULT_WINDOW // 2)
    assert lay_out(tokens, 64, None, None).window == 64
    with_bos = lay_out(Tokens(tokens.ids, (1,)), 2, None, None)
    assert (with_bos.window, with_bos.room, with_bos.stride) == (2, 1, 1)


@pytest.mark.parametrize(
    ("context", "window", "stride", "told"),
    [
        (64, 65, None, "--max-tokens-per-window 65 exceeds the context of 64"),
        (64, 1, None, "at least 2"),
        (1, None, None, "at least 2"),
        (64, 0, None, "at least 2"),
        (64, 8, 8, "--stride 8 must be between 1 and 7"),
        (64, 8, 0, "--stride 0"),
    ],
)
def test_windows_that_cannot_be(
    context: int, window: int | None, stride: int | None, told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        lay_out(Tokens(np.arange(9, dtype=np.int32), ()), context, window, stride)


def _with_bos(tiny: Bundle, add: bool | None) -> tuple[Tokenizer, int]:
    from dataclasses import replace

    assets = tiny.text()
    bos = assets.bos_token_id if assets.bos_token_id is not None else 0
    return Tokenizer(replace(assets, bos_token_id=bos, add_bos_token=add)), bos


def test_bos_stands_apart(tiny: Bundle) -> None:
    tokenizer, bos = _with_bos(tiny, True)
    plain = tokenizer.encode("Call me Ishmael", add_special_tokens=False)
    tokens = tokenise("Call me Ishmael", tokenizer)
    assert tokens.bos == (bos,) and tokens.ids.tolist() == plain
    without, _ = _with_bos(tiny, False)
    assert tokenise("Call me Ishmael", without).bos == ()


@pytest.mark.parametrize(
    ("text", "told"), [("", "empty"), (" \n", "empty"), ("a", r"1 token\(s\)")]
)
def test_texts_with_nothing_to_score(text: str, told: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match=told):
        tokenise(text, tokenizer)


def test_no_tokenizer() -> None:
    with pytest.raises(UsageError, match=r"no tokenizer\.json"):
        tokenise("some text", Tokenizer(TextAssets()))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        read_text(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="--text"):
        read_text(tmp_path)
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(UsageError, match="byte 3 is no UTF-8"):
        read_text(latin)
