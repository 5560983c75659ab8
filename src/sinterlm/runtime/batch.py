"""What one step of the model takes and gives: numpy twins of abi.h's sl_step_args and sl_sampling.

Plain data. All arrays are C-contiguous and borrowed for the duration of the step; ``Model.step``
checks shapes and ranges and refuses a batch the library could not run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
UInt32 = NDArray[np.uint32]


def _no_tokens() -> Int32:
    return np.empty(0, np.int32)


def _no_bias() -> Float32:
    return np.empty(0, np.float32)


def token_mask(token_ids: Iterable[int], vocab_size: int) -> UInt32:
    """The bit mask of abi.h, [ceil(V / 32)], with the bits of ``token_ids`` set."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[np.fromiter(token_ids, np.int64)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


@dataclass(slots=True, eq=False)
class RowSampling:
    """How one row's token is drawn; field by field ``sl_sampling``. Defaults mean greedy.

    Not frozen: the engine keeps one per request and moves its position before each step.
    Order of operations: bias and allowed mask, penalties, temperature, min_p, top_k, top_p, draw.
    """

    temperature: float = 0.0  #: 0 = greedy
    top_p: float = 1.0  #: (0, 1]
    min_p: float = 0.0  #: [0, 1]
    top_k: int = 0  #: 0 = all
    repetition_penalty: float = 1.0  #: over prompt and output
    presence_penalty: float = 0.0  #: over output
    frequency_penalty: float = 0.0  #: over output
    seed: int = 0  #: 64 bits, unsigned
    position: int = 0  #: index of the token being drawn in its sequence
    num_logprobs: int = -1  #: -1 = none, 0 = the sampled token's, n = also the n best
    prompt_tokens: Int32 = field(default_factory=_no_tokens)  #: [p]; read only with a penalty set
    output_tokens: Int32 = field(default_factory=_no_tokens)  #: [o]; read only with a penalty set
    bias_ids: Int32 = field(default_factory=_no_tokens)  #: [b] unique token ids
    bias: Float32 = field(default_factory=_no_bias)  #: [b] added to raw logits; may be -inf
    allowed: UInt32 | None = None  #: [ceil(V / 32)] bit mask over the vocabulary; None = all
    stop_tokens: Int32 = field(default_factory=_no_tokens)  #: [s] end a call of several steps


@dataclass(frozen=True, slots=True, eq=False)
class StepBatch:
    """One step: T tokens of S sequences, R of whose rows are sampled."""

    token_ids: Int32  #: [T]; -1 = the last token sampled in this sequence's slot
    positions: Int32  #: [T] consecutive within a sequence
    query_start: Int32  #: [S + 1]
    context_lens: Int32  #: [S] tokens in the cache after this step
    page_table: Int32  #: [S, P] page ids; unused entries are 0 and never read
    sample_rows: Int32  #: [R] token indices, ascending
    sampling: tuple[RowSampling, ...] = ()  #: [R]; empty = draw nothing (logits only)
    slots: Int32 | None = None  #: [S] where the last sampled token is kept, -1 none
    want_logits: bool = False  #: also copy out the raw logits of every sample row
    max_logprobs: int = 0  #: width L of the two top_* results; >= every num_logprobs

    @property
    def num_tokens(self) -> int:
        """T: tokens over all sequences."""
        return len(self.token_ids)

    @property
    def num_seqs(self) -> int:
        """S: sequences in the step."""
        return len(self.context_lens)


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """What one step drew. The arrays belong to the caller and outlive the next step."""

    tokens: Int32  #: [R]; empty when nothing was drawn
    logprobs: Float32  #: [R] log-softmax of the raw logits at the token
    ranks: Int32  #: [R] 1 = the most likely
    top_ids: Int32  #: [R, L] best first, ties by lower id
    top_logprobs: Float32  #: [R, L]
    logits: Float32 | None = None  #: [R, V] with want_logits
