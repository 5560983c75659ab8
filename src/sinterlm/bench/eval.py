"""Quality of each dtype against fp32, teacher-forced over a text: every token is predicted from the
true tokens before it.

One model is open at a time. The reference runs first and leaves its logits in an unnamed temporary
file, read back a window at a time: memory holds two windows of logits and one model, whatever the
lengths of text and model. The file takes 4 bytes x scored tokens x vocabulary; TMPDIR says where.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import IO, Protocol

import numpy as np

from sinterlm.artifact.progress import Progress
from sinterlm.bench.eval_metrics import Deltas, bootstrap_mean, compare, perplexity, token_nll
from sinterlm.bench.eval_server import Server, TopDeltas, compare_told
from sinterlm.bench.eval_text import Layout, Tokens, Window, lay_out, tokenise
from sinterlm.engine.tokenizer import Tokenizer
from sinterlm.errors import ResourceError, UsageError
from sinterlm.runtime.batch import Float32

#: What every other dtype is compared with.
REFERENCE = "fp32"
#: Percentiles of max |Δlogit| over tokens.
PERCENTILES = (50.0, 99.0, 99.9)


class Scorer(Protocol):
    """What is needed of a model; ``LLM`` has it."""

    @property
    def max_model_len(self) -> int:
        """Longest window, tokens."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""
        ...

    def forward_logits(self, token_ids: Iterable[int]) -> Float32:
        """Logits [len, vocab]: row i is the model's opinion after token i."""
        ...


#: Opens a model; closed at the end of the ``with``.
Opener = Callable[[], AbstractContextManager[Scorer]]


@dataclass(frozen=True)
class Divergence:
    """How far a dtype lies from the reference; formulas in ``eval_metrics``."""

    kl: float  #: KL(reference‖dtype), nats, mean over tokens
    kl_interval: tuple[float, float] | None  #: 95 %, bootstrap over windows; None for one window
    top1_agreement: float  #: share of tokens where both prefer the same one
    #: Percentile over tokens ("50", …) -> max |Δlogit|; empty for a server, which tells no logits.
    max_logit_delta: dict[str, float]


@dataclass(frozen=True)
class Score:
    """What one dtype reached."""

    dtype: str
    tokens: int  #: scored
    nll: float | None  #: −log probability of the true token, nats, mean over tokens; None: not told
    perplexity: float | None  #: exp(nll)
    divergence: Divergence | None  #: None for the reference itself


@dataclass(frozen=True)
class EvalReport:
    """The scores, and all that decides them besides the model."""

    reference: str
    text_sha256: str
    text_tokens: int
    window_tokens: int  #: most tokens of a window, bos included
    stride: int
    num_windows: int
    scores: list[Score]  #: in the order asked for


def evaluate(
    openers: dict[str, Opener],
    dtypes: Sequence[str],
    text: str,
    progress: Progress,
    *,
    window: int | None = None,
    stride: int | None = None,
    server: Server | None = None,
) -> EvalReport:
    """Score ``dtypes`` on ``text``; ``openers`` has one for each, and for the reference. A
    ``server`` comes last, under its name.

    Raises UsageError for texts and windows that cannot be scored, ResourceError for want of disk,
    and whatever opening and running a model raise.
    """
    with ExitStack() as stack:
        logits = stack.enter_context(tempfile.TemporaryFile(prefix="sinterlm-eval-"))
        others = [dtype for dtype in dtypes if dtype != REFERENCE]
        with openers[REFERENCE]() as model:
            tokens = tokenise(text, model.tokenizer)
            layout = lay_out(tokens, model.max_model_len, window, stride)
            progress.stage(f"score {REFERENCE}", layout.num_scored, "tokens")
            keep = logits if others or server else None
            if server is not None:
                server.check_tokens(text, tokens.ids)
            scores = {REFERENCE: _score_reference(model, tokens, layout, keep, progress)}
        for dtype in others:
            with openers[dtype]() as model:
                _check_same_text(model, tokens, text, dtype)
                progress.stage(f"score {dtype}", layout.num_scored, "tokens")
                logits.seek(0)
                scores[dtype] = _score(dtype, model, tokens, layout, logits, progress)
        if server is not None:
            progress.stage(f"score {server.name}", layout.num_scored, "tokens")
            logits.seek(0)
            scores[server.name] = _score_server(server, tokens, layout, logits, progress)
            dtypes = [*dtypes, server.name]
    return EvalReport(
        reference=REFERENCE,
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        text_tokens=len(tokens.ids),
        window_tokens=layout.window,
        stride=layout.stride,
        num_windows=sum(1 for _ in layout.windows()),
        scores=[scores[dtype] for dtype in dtypes],
    )


def _score_reference(
    model: Scorer, tokens: Tokens, layout: Layout, keep: IO[bytes] | None, progress: Progress
) -> Score:
    """Score the reference, and leave its logits in ``keep`` if anything is to be compared."""
    parts = []
    for index, (window, logits) in enumerate(_logits_of(model, tokens, layout)):
        if keep is not None:
            if index == 0:
                _check_disk(layout.num_scored * logits.shape[1] * logits.itemsize)
            logits.tofile(keep)
        parts.append(token_nll(logits, tokens.ids[window.first : window.stop]))
        progress.advance(window.num_scored)
        del logits  # before the next window's are made
    nll = np.concatenate(parts)
    return Score(REFERENCE, len(nll), float(nll.mean()), perplexity(nll), None)


def _score(
    dtype: str,
    model: Scorer,
    tokens: Tokens,
    layout: Layout,
    reference: IO[bytes],
    progress: Progress,
) -> Score:
    """Score ``model`` against the logits in ``reference``, read from where it stands."""
    parts: list[Deltas] = []
    for window, logits in _logits_of(model, tokens, layout):
        theirs = np.fromfile(reference, np.float32, logits.size).reshape(logits.shape)
        parts.append(compare(theirs, logits, tokens.ids[window.first : window.stop]))
        progress.advance(window.num_scored)
        del logits, theirs  # before the next window's are made
    deltas = Deltas.join(parts)
    points = np.percentile(deltas.max_delta, PERCENTILES)
    divergence = Divergence(
        kl=float(deltas.kl.mean()),
        kl_interval=bootstrap_mean(deltas.kl, [len(part.kl) for part in parts]),
        top1_agreement=float(deltas.agrees.mean()),
        max_logit_delta={f"{at:g}": float(p) for at, p in zip(PERCENTILES, points, strict=True)},
    )
    nll = deltas.nll
    return Score(dtype, len(nll), float(nll.mean()), perplexity(nll), divergence)


def _score_server(
    server: Server, tokens: Tokens, layout: Layout, reference: IO[bytes], progress: Progress
) -> Score:
    """Score a server against the logits in ``reference``, read from where it stands."""
    parts: list[TopDeltas] = []
    vocab = os.fstat(reference.fileno()).st_size // 4 // layout.num_scored
    for window in layout.windows():
        ids = [*tokens.bos, *tokens.ids[window.start : window.stop].tolist()]
        told = server.told(ids, len(tokens.bos) + window.first - window.start)
        theirs = np.fromfile(reference, np.float32, window.num_scored * vocab)
        targets = tokens.ids[window.first : window.stop]
        parts.append(compare_told(theirs.reshape(window.num_scored, vocab), told, targets))
        progress.advance(window.num_scored)
    kl = np.concatenate([part.kl for part in parts])
    nll = np.concatenate([part.nll for part in parts])
    divergence = Divergence(
        kl=float(kl.mean()),
        kl_interval=bootstrap_mean(kl, [len(part.kl) for part in parts]),
        top1_agreement=float(np.concatenate([part.agrees for part in parts]).mean()),
        max_logit_delta={},
    )
    is_told = not np.isnan(nll).any()
    mean, ppl = (float(nll.mean()), perplexity(nll)) if is_told else (None, None)
    return Score(server.name, len(nll), mean, ppl, divergence)


def _logits_of(model: Scorer, tokens: Tokens, layout: Layout) -> Iterator[tuple[Window, Float32]]:
    """Each window with the logits [num_scored, vocab] that predict its scored tokens."""
    bos = np.asarray(tokens.bos, np.int32)
    for window in layout.windows():
        ids = np.concatenate([bos, tokens.ids[window.start : window.stop]])
        # The row before a token predicts it; the last row predicts what nobody asked for.
        first = len(bos) + window.first - window.start - 1
        yield window, model.forward_logits(ids)[first:-1]


def _check_same_text(model: Scorer, tokens: Tokens, text: str, dtype: str) -> None:
    """Two models of one checkpoint read a text alike; anything else would compare nothing."""
    own = tokenise(text, model.tokenizer)
    if own.bos != tokens.bos or not np.array_equal(own.ids, tokens.ids):
        raise UsageError(
            f"{dtype} and {REFERENCE} cut the text into different tokens, so they are not of one "
            "checkpoint; empty the cache with `sinterlm cache prune` and try again"
        )


def _check_disk(needed: int) -> None:
    """Raises ResourceError where temporary files have no room for ``needed`` bytes."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            f"the reference's logits take {needed / 1e9:.2f} GB and {folder} has "
            f"{free / 1e9:.2f} GB left; set TMPDIR to a folder with room, or give a shorter --text"
        )
