"""What the scheduler decides: the chunks of one step, and the limits they respect. Nouns only."""

from __future__ import annotations

from dataclasses import dataclass, field

from sinterlm.engine.request import Request


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Most of everything in one step."""

    max_num_seqs: int
    max_num_batched_tokens: int  #: over all sequences
    max_sample_rows: int  #: rows drawn from, or scored; at least max_num_seqs
    max_mixed_prefill_tokens: int  #: prefill tokens of a step in which something decodes
    num_scheduler_steps: int = 1  #: decode steps in one native call, when nobody needs to look


@dataclass(frozen=True, slots=True)
class Chunk:
    """``num_tokens`` tokens of one request in this step."""

    request: Request
    num_tokens: int  #: guesses included
    samples: bool  #: whether it reaches the request's last token, so that a new one is drawn
    num_drafts: int = 0  #: guesses at the end of the chunk; each draws a token too
    scored: range = range(0)  #: positions whose logits tell the next prompt token's logprob

    @property
    def num_drawn(self) -> int:
        """Rows that draw a token."""
        return 1 + self.num_drafts if self.samples else 0

    @property
    def num_rows(self) -> int:
        """Rows of logits that the chunk needs."""
        return len(self.scored) + self.num_drawn


@dataclass(slots=True)
class Schedule:
    """One step's work, and who lost their pages for it."""

    chunks: list[Chunk] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    num_steps: int = 1  #: most times it may run on; every chunk is one decode if more than one

    @property
    def num_tokens(self) -> int:
        """Tokens over all chunks."""
        return sum(chunk.num_tokens for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Drawn:
    """What one sequence drew in a step."""

    request: Request
    first_row: int  #: of the step's sampled rows; the following tokens have the rows after it
    token_ids: list[int]  #: one, and one more for each guess that was right


def fit_chunk(request: Request, num_tokens: int, num_rows: int) -> Chunk | None:
    """The request's next chunk of at most so many tokens and rows; None when there is no room."""
    first, uncomputed, unscored = request.num_computed, request.num_uncomputed, request.unscored
    num_tokens = min(num_tokens, uncomputed)
    if unscored:
        num_tokens = min(num_tokens, unscored.start - first + num_rows)
    while num_tokens > 0:
        scored = range(unscored.start, min(unscored.stop, first + num_tokens))
        chunk = Chunk(request, num_tokens, num_tokens == uncomputed, scored=scored)
        if chunk.num_rows <= num_rows:
            return chunk
        num_tokens -= 1
    return None
