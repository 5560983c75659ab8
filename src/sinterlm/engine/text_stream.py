"""From token ids to text, one token at a time: UTF-8 safe detokenising and stop strings.

Independent of any tokenizer library: needs only a function from ids to text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

_REPLACEMENT = "\ufffd"
#: Prompt tokens put before the output, so that decoders that treat the start of a text specially
#: (SentencePiece drops a leading space) see a middle.
CONTEXT_TOKENS = 5
#: A character spans at most 4 bytes; a run of this many tokens that never completes one is noise.
_MAX_PENDING = 64


class Detokenizer:
    """Incremental decoder. Text is given out once no later token can change it.

    Keeps a window ``ids[start:]`` whose decoding begins with text already given; a token may hold
    part of a character, which decodes to trailing U+FFFD and is held back until it is complete.
    """

    def __init__(self, decode: Decode, context: Sequence[int]) -> None:
        self._decode = decode
        self._ids = [int(i) for i in context[-CONTEXT_TOKENS:]]
        self._read = len(self._ids)  # ids[:read] were complete when last looked at
        self._given = len(decode(self._ids).rstrip(_REPLACEMENT)) if self._ids else 0

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens; returns the text that became final, often empty or one word."""
        self._ids += token_ids
        window = self._decode(self._ids)
        stable = window.rstrip(_REPLACEMENT)
        if len(stable) < len(window) and len(self._ids) - self._read > _MAX_PENDING:
            stable = window
        delta = stable[self._given :]
        self._given = max(self._given, len(stable))
        if len(stable) == len(window):
            self._advance()
        return delta

    def flush(self) -> str:
        """Whatever is still held back, an incomplete character as U+FFFD. Ends the stream."""
        return self._decode(self._ids)[self._given :] if self._ids else ""

    def _advance(self) -> None:
        """Drop the part of the window that the newest tokens no longer need as context."""
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        self._given = len(self._decode(self._ids))


class TextStream:
    """One sequence's text with its stop strings.

    ``eager`` decodes each token as it comes; otherwise, and without stop strings, decoding waits
    for ``finish`` (the same text, in one call).
    """

    def __init__(
        self,
        decode: Decode,
        context: Sequence[int],
        stop: tuple[str, ...],
        *,
        include_stop: bool,
        eager: bool,
    ) -> None:
        self.text = ""  #: all text so far, cut at the stop string once one was found
        self._detokenizer = Detokenizer(decode, context)
        self._stop = stop
        self._include_stop = include_stop
        self._eager = eager or bool(stop)
        self._pending: list[int] = []
        self._searched = 0  # characters of text in which no stop string ends
        self._given = 0  # characters handed out by take_delta
        self._finished = False

    @property
    def may_stop(self) -> bool:
        """Whether the text itself, by a stop string, can end the sequence."""
        return bool(self._stop)

    def push(self, token_id: int, *, may_stop: bool) -> str | None:
        """Add a token. Returns the stop string that it completed, None otherwise.

        Without ``may_stop`` (fewer than min_tokens so far) stop strings are let through.
        """
        if not self._eager:
            self._pending.append(token_id)
            return None
        self.text += self._detokenizer.push([token_id])
        found = self._find_stop() if may_stop else None
        self._searched = len(self.text)
        if found is None:
            return None
        start, stop = found
        self.text = self.text[: start + len(stop) if self._include_stop else start]
        self._finished = True
        return stop

    def finish(self) -> None:
        """No token will follow: decode what waits, give out what was held back. Idempotent."""
        if not self._finished:
            if self._pending:
                self.text += self._detokenizer.push(self._pending)
            self.text += self._detokenizer.flush()
            self._finished = True

    def take_delta(self) -> str:
        """Text not handed out yet, less a tail that may turn out to begin a stop string."""
        end = len(self.text)
        if not self._finished and not self._include_stop:
            end -= self._held_back()
        delta = self.text[self._given : end]
        self._given = max(self._given, end)
        return delta

    def _find_stop(self) -> tuple[int, str] | None:
        """The stop string that completes first (the longest of several), and where it starts.

        So chosen, the result does not depend on how the text is cut into tokens.
        """
        best: tuple[int, int, str] | None = None
        for stop in self._stop:
            start = self.text.find(stop, max(0, self._searched - len(stop) + 1))
            if start >= 0:
                candidate = (start + len(stop), start, stop)
                best = candidate if best is None else min(best, candidate)
        return None if best is None else (best[1], best[2])

    def _held_back(self) -> int:
        """Length of the longest tail that is a proper beginning of a stop string."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for length in range(min(longest, len(self.text)), 0, -1):
            tail = self.text[-length:]
            if any(len(s) > length and s.startswith(tail) for s in self._stop):
                return length
        return 0
