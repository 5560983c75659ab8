"""SamplingParams: how tokens are drawn and when a sequence ends. vLLM's names and meanings.

Refuses every value it cannot honour, naming field and value; nothing is clamped or ignored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sinterlm.engine.structured import StructuredOutputs
from sinterlm.errors import UsageError

MAX_LOGPROBS = 20  #: most alternatives per token, as in vLLM and the OpenAI protocol
MAX_STOP_STRINGS = 64
MAX_BAD_WORDS = 256
MAX_COMPLETIONS = 1024
#: What is smaller may arrive in the library as 0, where a value must be above it.
_LEAST_FP32 = 1.2e-38

#: generation_config.json keys that set sampling defaults -> our field, as in vLLM.
_GENERATION_KEYS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request. Raises UsageError on construction with a bad value."""

    n: int = 1  #: completions per prompt
    temperature: float = 1.0  #: 0 = greedy
    top_p: float = 1.0  #: (0, 1]
    top_k: int = 0  #: 0 or -1 = all
    min_p: float = 0.0  #: [0, 1]
    repetition_penalty: float = 1.0  #: > 0, over prompt and output
    presence_penalty: float = 0.0  #: [-2, 2], over output
    frequency_penalty: float = 0.0  #: [-2, 2], over output
    seed: int | None = None  #: None = from the engine's seed and the request's number
    stop: str | Iterable[str] | None = None  #: stored as a tuple
    stop_token_ids: Iterable[int] | None = None  #: stored as a tuple
    min_tokens: int = 0  #: no eos, stop token or stop string before this many tokens
    max_tokens: int | None = 16  #: None = as many as the context has room for
    logprobs: int | None = None  #: alternatives per token, 0 = the drawn token alone
    prompt_logprobs: int | None = None  #: the same for each prompt token but the first
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] | None = None  #: token id -> added to its raw logit
    bad_words: Iterable[str] | None = None  #: texts never completed; stored as a tuple
    allowed_token_ids: Iterable[int] | None = None  #: draw none but these; stored as a tuple
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputs | None = None  #: what the text must look like
    detokenize: bool = True  #: False leaves ``text`` empty; stop strings then cannot be used

    def __post_init__(self) -> None:
        """Normalise the sequences, then check every field."""
        set_field = object.__setattr__
        set_field(self, "stop", _strings("stop", self.stop, MAX_STOP_STRINGS))
        set_field(self, "bad_words", _strings("bad_words", self.bad_words, MAX_BAD_WORDS))
        set_field(self, "stop_token_ids", _ids("stop_token_ids", self.stop_token_ids))
        if self.allowed_token_ids is not None:
            set_field(self, "allowed_token_ids", _ids("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise _bad("allowed_token_ids", [], "must name at least one token")
        set_field(self, "logit_bias", _bias(self.logit_bias))
        _check_numbers(self)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output",
                     "detokenize"):  # fmt: skip
            if not isinstance(getattr(self, name), bool):
                raise _bad(name, getattr(self, name), "must be True or False")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _bad("min_tokens", self.min_tokens, f"exceeds max_tokens={self.max_tokens}")
        if self.stop and not self.detokenize:
            raise _bad("stop", self.stop, "needs detokenize=True")
        self._check_structured()

    def _check_structured(self) -> None:
        if not isinstance(self.structured_outputs, StructuredOutputs | None):
            raise _bad("structured_outputs", self.structured_outputs, "is no StructuredOutputs")
        # The text may need the token; a large negative number says "unless it must be".
        if self.structured_outputs is not None and -math.inf in (self.logit_bias or {}).values():
            raise UsageError(
                "logit_bias of -inf contradicts structured_outputs, which may leave no other "
                "token; use -100"
            )
        if self.structured_outputs is not None and self.bad_words:
            raise _bad(
                "bad_words", self.bad_words, "contradicts structured_outputs, which may need them"
            )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as stored."""
        return tuple(self.stop) if self.stop else ()

    @property
    def bad_texts(self) -> tuple[str, ...]:
        """``bad_words`` as stored."""
        return tuple(self.bad_words) if self.bad_words else ()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """``stop_token_ids`` as stored."""
        return tuple(self.stop_token_ids) if self.stop_token_ids else ()

    @property
    def allowed_ids(self) -> tuple[int, ...] | None:
        """``allowed_token_ids`` as stored."""
        return None if self.allowed_token_ids is None else tuple(self.allowed_token_ids)

    @property
    def has_penalties(self) -> bool:
        """Whether the draw depends on the token history."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise UsageError when a token id of this request is not below ``vocab_size``."""
        for name, ids in (
            ("stop_token_ids", self.stop_ids),
            ("allowed_token_ids", self.allowed_ids or ()),
            ("logit_bias", self.logit_bias or ()),
        ):
            for token_id in ids:
                if token_id >= vocab_size:
                    limit = f"token ids of this model are 0 … {vocab_size - 1}"
                    raise _bad(name, token_id, f"is out of range: {limit}")


def default_sampling_params(generation: Mapping[str, Any]) -> SamplingParams:
    """vLLM's defaults overlaid with a checkpoint's generation_config.json.

    Raises UsageError naming the key when the file holds a value that cannot be used.
    """
    given = {
        ours: generation[theirs]
        for theirs, ours in _GENERATION_KEYS.items()
        if generation.get(theirs) is not None
    }
    try:
        return SamplingParams(**given)
    except UsageError as exc:
        raise UsageError(
            f"generation_config.json holds an unusable default: {exc}; correct the file"
        ) from exc


def _bad(name: str, value: object, why: str) -> UsageError:
    return UsageError(f"{name}={value!r} {why}", field=name.split("[")[0])


def _check_numbers(params: SamplingParams) -> None:
    _integer("n", params.n, 1, MAX_COMPLETIONS)
    _number("temperature", params.temperature, 0.0, math.inf)
    _number("top_p", params.top_p, 0.0, 1.0)
    if params.top_p < _LEAST_FP32:
        raise _bad("top_p", params.top_p, "must be in (0, 1]; use temperature=0 for greedy")
    _integer("top_k", params.top_k, -1, 2**31 - 1)
    _number("min_p", params.min_p, 0.0, 1.0)
    _number("repetition_penalty", params.repetition_penalty, 0.0, math.inf)
    if params.repetition_penalty < _LEAST_FP32:
        raise _bad("repetition_penalty", params.repetition_penalty, "must be above 0")
    _number("presence_penalty", params.presence_penalty, -2.0, 2.0)
    _number("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
    if params.seed is not None:
        _integer("seed", params.seed, 0, 2**64 - 1)
    _integer("min_tokens", params.min_tokens, 0, 2**31 - 1)
    if params.max_tokens is not None:
        _integer("max_tokens", params.max_tokens, 1, 2**31 - 1)
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(params, name) is not None:
            _integer(name, getattr(params, name), 0, MAX_LOGPROBS)


def _integer(name: str, value: object, low: int, high: int) -> None:
    # bool is an int to Python; `n=True` is a mistake, never a number.
    if isinstance(value, bool) or not isinstance(value, int):
        raise _bad(name, value, "must be an integer")
    if not low <= value <= high:
        raise _bad(name, value, f"must be between {low} and {high}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _bad(name, value, "must be a number")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        finite = False
    if not finite:
        raise _bad(name, value, "must be finite")
    if not low <= value <= high:
        wanted = f"between {low:g} and {high:g}" if high != math.inf else f"at least {low:g}"
        raise _bad(name, value, f"must be {wanted}")
    # The library computes in fp32: a finite double beyond it would arrive as infinity.
    if abs(value) > 3.4e38:
        raise _bad(name, value, "must be representable in 32 bits")


def _strings(name: str, value: object, most: int) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, list | tuple):
        raise _bad(name, value, "must be a string or a list of strings")
    for item in value:
        if not isinstance(item, str):
            raise _bad(name, item, "must be a string")
        if not item:
            raise _bad(name, item, "must not be empty")
    if len(value) > most:
        raise _bad(name, f"{len(value)} strings", f"must be at most {most}")
    return tuple(value)


def _ids(name: str, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple | set | frozenset | range):
        raise _bad(name, value, "must be a list of token ids")
    for item in value:
        _integer(name, item, 0, 2**31 - 1)
    return tuple(sorted(set(value)))


def _bias(value: object) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _bad("logit_bias", value, "must map token ids to numbers")
    for token_id, bias in value.items():
        _integer("logit_bias", token_id, 0, 2**31 - 1)
        if bias == -math.inf and isinstance(bias, float):
            continue  # the customary way to forbid a token
        _number(f"logit_bias[{token_id}]", bias, -3.4e38, 3.4e38)
    return {token_id: float(bias) for token_id, bias in sorted(value.items())}
