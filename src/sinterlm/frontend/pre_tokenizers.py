"""How text is split before byte-level BPE, by the names GGUF files use for it.

A GGUF names its pre-tokenizer instead of carrying it; the names and patterns are llama.cpp's, and
the values are the parts of a Hugging Face tokenizer.json that mean the same. Any other name is
refused: a wrong split gives wrong tokens without any sign of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sinterlm.errors import UnsupportedModelError
from sinterlm.frontend.fields import show

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """Parts of a tokenizer.json that belong to one pre-tokenizer name."""

    steps: tuple[dict[str, Any], ...]
    normalizer: dict[str, Any] | None = None
    ignore_merges: bool = False  #: a word that is in the vocabulary is one token, merges or not
    add_bos: bool = False  #: when the file does not say


def pre_tokenizer(name: str, what: str) -> PreTokenizer:
    """The pre-tokenizer called ``name``. Raises UnsupportedModelError, listing the known ones."""
    llama3 = PreTokenizer(_split(_LLAMA3), ignore_merges=True, add_bos=True)
    gpt2 = PreTokenizer((_byte_level(use_regex=True),))
    qwen2 = PreTokenizer(_split(_QWEN2), normalizer={"type": "NFC"})
    known = {
        "smollm": PreTokenizer(
            ({"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True))
        ),
        "gpt-2": gpt2,
        "default": gpt2,
        "llama-bpe": llama3,
        "llama3": llama3,
        "llama-v3": llama3,
        "qwen2": qwen2,
        "deepseek-r1-qwen": PreTokenizer(_split(_QWEN2)),
        "tekken": PreTokenizer(_split(_TEKKEN), ignore_merges=True, add_bos=True),
    }
    if name not in known:
        raise UnsupportedModelError(
            f"{what}: pre-tokenizer {show(name)} is not supported; supported: {', '.join(known)}"
        )
    return known[name]


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _split(pattern: str) -> tuple[dict[str, Any], ...]:
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return (split, _byte_level(use_regex=False))
