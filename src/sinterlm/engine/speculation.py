"""Guessing tokens by prompt lookup: what followed the last few tokens when they stood here before.

A guess costs no model. It is checked by drawing at its place as without it: the draw depends on
seed, position and history alone, so a right guess is the token that would have been drawn, and the
output never changes, greedy or sampled.
"""

from __future__ import annotations

import numpy as np

from sinterlm.runtime.batch import Int32

_NONE: Int32 = np.empty(0, np.int32)


class NgramProposer:
    """Looks in a sequence for its last ``longest`` … ``shortest`` tokens, the longest match first.

    Of several places the latest with ``num_tokens`` tokens behind it is taken, else the one that
    has most. (The technique: Saxena, "Prompt Lookup Decoding", 2023.)
    """

    def __init__(self, num_tokens: int, *, shortest: int, longest: int) -> None:
        assert num_tokens >= 1 and 1 <= shortest <= longest
        self._num_tokens, self._shortest, self._longest = num_tokens, shortest, longest

    def propose(self, history: Int32, most: int) -> Int32:
        """Up to min(``most``, ``num_tokens``) tokens [n] that may follow ``history`` [L]."""
        most = min(most, self._num_tokens)
        end = len(history)
        if most <= 0 or end <= self._shortest:
            return _NONE
        # Ends of all earlier places where the last token stands, then narrowed backwards.
        places = np.flatnonzero(history[: end - 1] == history[end - 1])
        best = places[:0]
        for length in range(1, min(self._longest, end - 1) + 1):
            if length > 1:
                places = places[places >= length - 1]
                places = places[history[places - (length - 1)] == history[end - length]]
            if len(places) == 0:
                break
            if length >= self._shortest:
                best = places
        if len(best) == 0:
            return _NONE
        complete = best[best < end - most]
        start = int(complete[-1] if len(complete) else best[0]) + 1
        return history[start : start + most]
