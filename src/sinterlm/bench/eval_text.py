"""What ``eval`` reads: the shipped text, its tokens, and the windows that score each of them once.

Refuses texts with nothing to predict and windows that leave a token without a context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from sinterlm.engine.tokenizer import Tokenizer
from sinterlm.errors import UsageError
from sinterlm.runtime.batch import Int32

#: Tokens of a window where nothing else is asked for: enough windows in the shipped text for an
#: interval, and the logits of a vocabulary of 152k in 0.3 GB.
DEFAULT_WINDOW = 512


def shipped_text() -> str:
    """The text set of the package: public-domain prose, its sources in ``data/SOURCES.md``."""
    return (files("sinterlm.bench") / "data" / "eval.txt").read_text(encoding="utf-8")


def read_text(path: Path) -> str:
    """The text of a file. Raises UsageError where it cannot be read, or is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as exc:
        raise UsageError(
            f"--text {path}: {exc.strerror or exc}; give a file of UTF-8 text"
        ) from exc
    except UnicodeDecodeError as exc:
        raise UsageError(
            f"--text {path}: byte {exc.start} is no UTF-8; convert it, e.g. with iconv -t UTF-8"
        ) from exc


@dataclass(frozen=True)
class Tokens:
    """A text as a model reads it."""

    ids: Int32  #: [n], what is predicted, without special tokens
    bos: tuple[int, ...]  #: put before every window: the model's bos token, or nothing


def tokenise(text: str, tokenizer: Tokenizer) -> Tokens:
    """Token ids of ``text``; a bos token stands apart where the model wants one.

    Special tokens at the end (some tokenizers add an eos) are left out. Raises UsageError without
    a tokenizer, and for a text of fewer than two tokens.
    """
    if not tokenizer.has_vocabulary:
        raise UsageError(
            "this model has no tokenizer.json, so no text can be given to it; put the tokenizer's "
            "files beside its weights"
        )
    if not text.strip():
        raise UsageError("the text is empty; give at least two tokens of it")
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) < 2:
        raise UsageError(f"the text has {len(ids)} token(s); nothing follows that could be scored")
    bos = tokenizer.assets.bos_token_id
    # A text that itself begins with bos written out needs no second one.
    adds_bos = bos is not None and ids[0] != bos and tokenizer.encode(text)[0] == bos
    return Tokens(np.asarray(ids, np.int32), (bos,) if adds_bos and bos is not None else ())


@dataclass(frozen=True)
class Window:
    """Tokens ``start`` to ``stop`` of a text, of which ``first`` to ``stop`` are scored."""

    start: int
    first: int
    stop: int

    @property
    def num_scored(self) -> int:
        """Tokens that this window scores."""
        return self.stop - self.first


@dataclass(frozen=True)
class Layout:
    """How a text is cut. Each token is scored by exactly one window; the first one of the text
    only where a bos token precedes it."""

    num_tokens: int  #: of the text
    num_bos: int  #: 0 or 1, in front of every window
    window: int  #: most tokens of a window, bos included
    stride: int  #: text tokens from one window's start to the next one's

    def __post_init__(self) -> None:
        most = self.room - (1 - self.num_bos)  # a scored token needs one before it
        if most < 1:
            raise UsageError(
                f"a window of {self.window} token(s) is too small: it needs at least 2, one to "
                "read and one to score; raise --max-tokens-per-window or --max-model-len"
            )
        if not 1 <= self.stride <= most:
            raise UsageError(
                f"--stride {self.stride} must be between 1 and {most} for windows of "
                f"{self.window} tokens, so that each token has a context"
            )

    @property
    def room(self) -> int:
        """Text tokens of a full window."""
        return self.window - self.num_bos

    @property
    def num_scored(self) -> int:
        """Tokens that all windows together score."""
        return self.num_tokens - (1 - self.num_bos)

    def windows(self) -> Iterator[Window]:
        """Windows in the order of the text; only the last may be shorter than ``window``."""
        start, first = 0, 1 - self.num_bos
        while first < self.num_tokens:
            stop = min(start + self.room, self.num_tokens)
            yield Window(start, first, stop)
            start, first = start + self.stride, stop


def lay_out(tokens: Tokens, max_model_len: int, window: int | None, stride: int | None) -> Layout:
    """Windows for ``tokens`` in a context of ``max_model_len``.

    ``window`` None = the context, at most ``DEFAULT_WINDOW``; ``stride`` None = half a window, so
    that every token past the first window has at least half a window before it. Raises UsageError.
    """
    if window is not None and window > max_model_len:
        raise UsageError(
            f"--max-tokens-per-window {window} exceeds the context of {max_model_len} tokens"
        )
    size = window if window is not None else min(max_model_len, DEFAULT_WINDOW)
    num_bos = len(tokens.bos)
    step = stride if stride is not None else max(1, (size - num_bos) // 2)
    return Layout(len(tokens.ids), num_bos, size, step)
