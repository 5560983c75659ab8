"""How far one set of logits lies from another, per token and summed up; float64 throughout.

With reference logits z and compared logits y over a vocabulary V, p = softmax(z), q = softmax(y),
and t the token that really follows: each function's docstring has its formula.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sinterlm.errors import RuntimeFault
from sinterlm.runtime.batch import Float32, Int32

Float64 = NDArray[np.float64]

#: Elements of one float64 temporary: rows are taken in blocks of so many.
_BLOCK_ELEMENTS = 1 << 21
#: Resamples of windows, and the share of them inside an interval.
_RESAMPLES, _COVERAGE = 2000, 0.95


def log_softmax(logits: Float32) -> Float64:
    """log softmax of each row: zᵢ − m − log Σⱼ exp(zⱼ − m) with m = max z. [n, V] -> [n, V]."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def token_nll(logits: Float32, targets: Int32) -> Float64:
    """−log softmax(logits)ₜ in nats. [n, V] and [n] -> [n]. Raises RuntimeFault for NaN or ∞."""
    parts = [
        -np.take_along_axis(log_softmax(logits[rows]), targets[rows, None], axis=1)[:, 0]
        for rows in _blocks(logits)
    ]
    return np.concatenate(parts)


@dataclass(frozen=True)
class Deltas:
    """Per token [n]: what the compared logits say, and how far they are from the reference's."""

    nll: Float64  #: −log q(t), nats
    kl: Float64  #: KL(p‖q) = Σᵥ p(v) · (log p(v) − log q(v)), nats
    agrees: NDArray[np.bool_]  #: argmaxᵥ z(v) = argmaxᵥ y(v), ties to the lowest id
    max_delta: Float64  #: maxᵥ |y(v) − z(v)|

    @classmethod
    def join(cls, parts: Sequence[Deltas]) -> Deltas:
        """The tokens of ``parts`` in order."""
        return cls(
            np.concatenate([part.nll for part in parts]),
            np.concatenate([part.kl for part in parts]),
            np.concatenate([part.agrees for part in parts]),
            np.concatenate([part.max_delta for part in parts]),
        )


def compare(reference: Float32, other: Float32, targets: Int32) -> Deltas:
    """``other`` against ``reference``, both [n, V], where tokens ``targets`` [n] follow.

    Raises RuntimeFault for logits that are NaN or infinite.
    """
    parts = []
    for rows in _blocks(reference):
        _check_finite(other[rows], rows.start)
        log_p, log_q = log_softmax(reference[rows]), log_softmax(other[rows])
        nll = -np.take_along_axis(log_q, targets[rows, None], axis=1)[:, 0]
        log_q *= -1.0
        log_q += log_p
        np.exp(log_p, out=log_p)
        kl = np.einsum("nv,nv->n", log_p, log_q)
        delta = np.subtract(other[rows], reference[rows], dtype=np.float64)
        agrees = reference[rows].argmax(axis=1) == other[rows].argmax(axis=1)
        parts.append(Deltas(nll, kl, agrees, np.abs(delta, out=delta).max(axis=1)))
    return Deltas.join(parts)


def perplexity(nll: Float64) -> float:
    """exp((1/n) Σ nll) over all tokens [n]."""
    return float(np.exp(nll.mean()))


def bootstrap_mean(values: Float64, sizes: Sequence[int]) -> tuple[float, float] | None:
    """A 95 % interval of the mean of ``values`` [Σ sizes]: the percentile bootstrap over windows.

    Tokens of one window depend on each other, so whole windows are drawn, as many as there are,
    with replacement; each draw gives Σ of sums / Σ of sizes. The draws are the same on every
    call. None for fewer than two windows.
    """
    if len(sizes) < 2:
        return None
    counts = np.asarray(sizes, np.float64)
    sums = np.add.reduceat(values, np.concatenate([[0], np.cumsum(sizes)[:-1]]))
    generator = np.random.default_rng(0)
    means = np.empty(_RESAMPLES)
    for i in range(_RESAMPLES):
        drawn = generator.integers(0, len(counts), len(counts))
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [(1 - _COVERAGE) / 2, (1 + _COVERAGE) / 2])
    return float(low), float(high)


def _blocks(logits: Float32) -> Iterator[slice]:
    """Slices of rows whose float64 copies stay small; each is checked to be finite."""
    num_rows, vocab_size = logits.shape
    step = max(1, _BLOCK_ELEMENTS // vocab_size)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        _check_finite(logits[rows], start)
        yield rows


def _check_finite(logits: Float32, first_row: int) -> None:
    good = np.isfinite(logits).all(axis=1)
    if not good.all():
        row = first_row + int(np.argmin(good))
        raise RuntimeFault(
            f"logits of scored row {row} of a window are NaN or infinite, so they cannot be "
            "compared; check the weights with `sinterlm run`, or try another --isa"
        )
