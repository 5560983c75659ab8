"""The tokenizer of a model for benchmarks: no weights are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sinterlm.errors import UsageError

if TYPE_CHECKING:
    from sinterlm.engine.tokenizer import Tokenizer


def tokenizer_of(model: str) -> Tokenizer:
    """Of anything `sinterlm run` takes as MODEL. Raises UsageError where it has no vocabulary."""
    from sinterlm.engine.tokenizer import Tokenizer
    from sinterlm.frontend.source import resolve_model

    with resolve_model(model, load_format="dummy") as checkpoint:
        tokenizer = Tokenizer(checkpoint.text)
    if not tokenizer.has_vocabulary:
        raise UsageError(f"{model} has no tokenizer.json; give another model as --tokenizer")
    return tokenizer
