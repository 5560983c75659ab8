"""Text in and out of a model; the only package that imports tokenizers and jinja2."""

from sinterlm.engine.tokenizer.messages import checked_messages
from sinterlm.engine.tokenizer.vocabulary import Tokenizer

__all__ = ["Tokenizer", "checked_messages"]
