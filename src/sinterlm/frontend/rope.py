"""Rotary embeddings as data: from a config's rope keys to inverse frequencies, in float64.

Follows the formulas of Hugging Face transformers' ``modeling_rope_utils`` for the kinds default,
linear, dynamic, llama3 and yarn; every other kind, and partial rotation, is refused by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinterlm.errors import CheckpointError, UnsupportedModelError
from sinterlm.frontend.fields import MAX_INT, MAX_NUMBER, Fields, show
from sinterlm.ir.graph import Rope

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
_DEFAULT_THETA = 10_000.0
_Float64s = NDArray[np.float64]


@dataclass(frozen=True)
class RopeLimits:
    """The lengths rope formulas depend on, in tokens."""

    head_dim: int
    max_position_embeddings: int
    max_model_len: int | None  #: the longest sequence the model will be run with, if known


def read_rope(config: Fields, limits: RopeLimits) -> tuple[Rope, int]:
    """Rope of a config and the number of positions it covers, in tokens.

    Both spellings are read: ``rope_theta`` beside ``rope_scaling`` (with ``type`` or
    ``rope_type``), and ``rope_parameters``, which holds both. Raises CheckpointError.
    """
    params = config.child("rope_scaling") or config.child("rope_parameters")
    params = params or Fields({}, f"{config.what}: rope_parameters")
    _refuse_partial(config, params)
    kind = params.text("rope_type", params.text("type", "default"))
    if kind not in ROPE_KINDS:
        raise UnsupportedModelError(
            f"{params.what}: rope type {show(kind)} is not supported; supported: "
            f"{', '.join(ROPE_KINDS)}"
        )
    for key in ("mrope_section", "short_factor", "long_factor"):
        if not params.absent(key):
            raise UnsupportedModelError(
                f"{params.what}: {key!r} is not supported; supported rope types: "
                f"{', '.join(ROPE_KINDS)}"
            )
    if any(isinstance(value, dict) for value in params.data.values()):
        raise UnsupportedModelError(
            f"{params.what}: rope parameters per layer type are not supported; supported: one set "
            "for all layers"
        )
    theta = params.number("rope_theta", config.number("rope_theta", _DEFAULT_THETA))
    if kind == "default":
        return _rope(_inverse(theta, limits.head_dim), 1.0, kind, params), (
            limits.max_position_embeddings
        )
    if kind == "linear":
        inv_freq = _inverse(theta, limits.head_dim) / params.number("factor")
        return _rope(inv_freq, 1.0, kind, params), limits.max_position_embeddings
    if kind == "dynamic":
        return _dynamic(params, theta, limits)
    original = _original_length(config, params, limits)
    if kind == "llama3":
        inv_freq = _llama3(params, _inverse(theta, limits.head_dim), original)
        return _rope(inv_freq, 1.0, kind, params), limits.max_position_embeddings
    return _yarn(params, theta, limits, original)


def _refuse_partial(config: Fields, params: Fields) -> None:
    for where in (config, params):
        for key in ("partial_rotary_factor", "rotary_pct"):
            if not where.absent(key) and where.number(key) != 1.0:
                raise UnsupportedModelError(
                    f"{where.what}: {key!r} is {show(where.data[key])}: rotating only part of each "
                    "head is not supported; supported: 1.0"
                )


def _inverse(theta: float, dim: int) -> _Float64s:
    exponents = np.arange(0, dim, 2, dtype=np.float64) / dim
    with np.errstate(all="ignore"):  # an absurd theta is caught by _rope
        frequencies: _Float64s = 1.0 / np.power(np.float64(theta), exponents)
    return frequencies


def _dynamic(params: Fields, theta: float, limits: RopeLimits) -> tuple[Rope, int]:
    """NTK scaling. Transformers recomputes the base as a sequence grows past
    ``max_position_embeddings``, so earlier tokens' keys would no longer match. Here the base is
    fixed once, for ``max_model_len``; up to ``max_position_embeddings`` both are the same."""
    factor = params.number("factor")
    trained, dim = limits.max_position_embeddings, limits.head_dim
    length = max(limits.max_model_len or trained, trained)
    if dim > 2 and length > trained:
        theta *= ((factor * length / trained) - (factor - 1)) ** (dim / (dim - 2))
    return _rope(_inverse(theta, dim), 1.0, "dynamic", params), length


def _original_length(config: Fields, params: Fields, limits: RopeLimits) -> int:
    """Tokens of pretraining context; a key beside the rope parameters wins, as in transformers."""
    key = "original_max_position_embeddings"
    inner = params.integer(key, limits.max_position_embeddings, high=MAX_INT)
    return config.integer(key, inner, high=MAX_INT)


def _llama3(params: Fields, inv_freq: _Float64s, original: int) -> _Float64s:
    factor = params.number("factor")
    low, high = params.number("low_freq_factor"), params.number("high_freq_factor")
    if high <= low:
        raise params.error("high_freq_factor", high, f"above low_freq_factor ({low})")
    with np.errstate(all="ignore"):
        wavelength = 2 * math.pi / inv_freq
        smooth = (original / wavelength - low) / (high - low)
        blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
        scaled = np.where(wavelength > original / low, inv_freq / factor, blended)
        return np.where(wavelength < original / high, inv_freq, scaled)


def _yarn(params: Fields, theta: float, limits: RopeLimits, original: int) -> tuple[Rope, int]:
    factor = params.number("factor", limits.max_position_embeddings / original)
    dim = limits.head_dim
    attention_factor = params.optional_number("attention_factor")
    if attention_factor is None:
        attention_factor = _yarn_attention_factor(params, factor)
    if theta <= 1.0:
        raise params.error("rope_theta", theta, "above 1 for yarn")
    rotations = (_non_zero(params, "beta_fast", 32.0), _non_zero(params, "beta_slow", 1.0))
    low, high = (
        dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in rotations
    )
    if params.boolean("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as transformers does: a step instead of a division by zero
    ramp = np.clip((np.arange(dim // 2, dtype=np.float64) - low) / (high - low), 0, 1)
    inv_freq = _inverse(theta, dim)
    with np.errstate(all="ignore"):
        inv_freq = inv_freq / factor * ramp + inv_freq * (1 - ramp)
    covered = max(limits.max_position_embeddings, int(min(original * factor, MAX_INT)))
    return _rope(inv_freq, attention_factor, "yarn", params), covered


def _non_zero(params: Fields, key: str, default: float) -> float:
    """Transformers takes 0 for "not given" here."""
    value = params.data.get(key)
    return default if not isinstance(value, bool) and value == 0 else params.number(key, default)


def _yarn_attention_factor(params: Fields, factor: float) -> float:
    mscale, all_dim = (
        0.0 if params.absent(key) else params.number(key, low=-MAX_NUMBER)
        for key in ("mscale", "mscale_all_dim")
    )

    def scale(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    if not (mscale and all_dim):
        return scale(1.0)
    if scale(all_dim) == 0:
        raise params.error("mscale_all_dim", all_dim, "a value that leaves a finite factor")
    return scale(mscale) / scale(all_dim)


def _rope(inv_freq: _Float64s, attention_factor: float, kind: str, params: Fields) -> Rope:
    """Checked Rope; overflow and division by zero in the formulas above end here."""
    good = bool(np.isfinite(inv_freq).all() and (inv_freq > 0).all())
    if not good or not math.isfinite(attention_factor):
        raise CheckpointError(
            f"{params.what}: these {kind} parameters give frequencies that are not positive and "
            "finite"
        )
    return Rope(tuple(float(f) for f in inv_freq), attention_factor, kind)


def divide_rope(rope: Rope, factors: NDArray[Any], what: str) -> Rope:
    """Rope with each inverse frequency divided by its factor (a GGUF's ``rope_freqs.weight``,
    float32 [head_dim / 2], which holds llama3's scaling). Raises CheckpointError."""
    if factors.shape != (len(rope.inv_freq),):
        raise CheckpointError(
            f"{what}: shape {list(factors.shape)}, expected [{len(rope.inv_freq)}]"
        )
    with np.errstate(all="ignore"):
        inv_freq = np.array(rope.inv_freq, np.float64) / factors.astype(np.float64)
    return _rope(inv_freq, rope.attention_factor, "llama3", Fields({}, what))
