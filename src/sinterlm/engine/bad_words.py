"""BadWords: what may not be drawn next, because it would complete a word that is not wanted.

vLLM's reading: a word is a sequence of tokens, at the beginning of a text and, where that makes
another first token, after a blank. Its last token is barred where the tokens drawn just before are
the rest of it; what the prompt ends with does not count.
"""

from __future__ import annotations

from collections.abc import Iterable

from sinterlm.engine.tokenizer import Tokenizer
from sinterlm.errors import UsageError
from sinterlm.runtime.batch import Int32


class BadWords:
    """The rules of one request; its sequences share them."""

    def __init__(self, sequences: Iterable[tuple[int, ...]]) -> None:
        self._after: dict[int, list[tuple[int, ...]]] = {}  # by the token before the last
        single, last = set(), set()
        for sequence in dict.fromkeys(sequences):
            last.add(sequence[-1])
            if len(sequence) == 1:
                single.add(sequence[0])
            else:
                self._after.setdefault(sequence[-2], []).append(sequence)
        self.always = frozenset(single)  #: words of one token
        self.sometimes = frozenset(last)  #: whatever may be barred at some place, ``always`` too

    @property
    def changes(self) -> bool:
        """Whether what is barred depends on what was drawn."""
        return bool(self._after)

    def barred(self, output: Int32) -> set[int]:
        """What may not follow these drawn tokens, beside ``always``."""
        if not len(output):
            return set()
        return {
            sequence[-1]
            for sequence in self._after.get(int(output[-1]), ())
            if tuple(output[1 - len(sequence) :].tolist()) == sequence[:-1]
        }


def read_bad_words(words: Iterable[str], tokenizer: Tokenizer, vocab_size: int) -> BadWords | None:
    """``words`` in the tokens of a model; None when there are none. Raises UsageError."""
    sequences = []
    for word in words:
        bare = word.lstrip()
        plain = tokenizer.encode(bare, add_special_tokens=False)
        spaced = tokenizer.encode(" " + bare, add_special_tokens=False)
        if not plain:
            raise UsageError(f"bad_words={word!r} holds no token", field="bad_words")
        sequences.append(tuple(plain))
        if len(spaced) == len(plain) and spaced[0] != plain[0]:
            sequences.append(tuple(spaced))
        if max(*plain, *spaced) >= vocab_size:
            raise UsageError(
                f"bad_words={word!r} holds a token that this model never draws", field="bad_words"
            )
    return BadWords(sequences) if sequences else None
