"""An LLM as a model of lm-evaluation-harness (the extra ``eval``), for use from Python::

    lm_eval.simple_evaluate(model=harness_model(llm), tasks=["hellaswag"])

The harness is imported only when a model of it is asked for. Contexts too long for the model lose
their beginning, as with the harness's own models, and a warning counts them; what is to be scored
is never shortened.
"""

from __future__ import annotations

import importlib
import logging
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sinterlm.bench.eval_metrics import token_nll
from sinterlm.engine.prompts import TokensPrompt
from sinterlm.engine.sampling import SamplingParams
from sinterlm.errors import PromptError, UsageError

if TYPE_CHECKING:
    from sinterlm.engine.llm import LLM

#: Tokens generated where a task does not say, as in the harness's own models.
DEFAULT_MAX_GEN_TOKS = 256
_GENERATION_KEYS = {"until", "do_sample", "temperature", "max_gen_toks", "top_p", "top_k"}


class Request(Protocol):
    """``lm_eval.api.instance.Instance``, as far as it is read."""

    @property
    def args(self) -> tuple[Any, ...]:
        """What the request asks: texts, or a text and how to generate."""
        ...


class HarnessAnswers:
    """The three questions that the harness asks of a model, answered by an LLM."""

    def __init__(self, llm: LLM) -> None:
        super().__init__()  # the harness's base class, where there is one
        if not llm.tokenizer.has_vocabulary:
            raise UsageError("this model has no tokenizer.json, and the harness gives it texts")
        self._llm = llm

    def loglikelihood(
        self, requests: Sequence[Request], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """For each (context, continuation): log p(continuation | context) in nats, and whether
        greedy decoding would give it. Raises PromptError for one longer than the model's context.
        """
        answers, shortened = [], 0
        for request in requests:
            context, continuation = self._encode_pair(*request.args)
            if len(continuation) > self._llm.max_model_len:
                raise PromptError(
                    f"a continuation has {len(continuation)} tokens, and max_model_len is "
                    f"{self._llm.max_model_len}; load the model with a larger max_model_len"
                )
            inputs = (context + continuation)[:-1]
            shortened += len(inputs) > self._llm.max_model_len
            answers.append(self._score(inputs[-self._llm.max_model_len :], continuation))
        _warn_of(shortened)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Request], disable_tqdm: bool = False
    ) -> list[float]:
        """For each (text,): log p(text) in nats after the model's prefix token, cut into windows
        that predict each token once with as much context as the harness defines."""
        answers = []
        for request in requests:
            (text,) = request.args
            tokens = self._encode(text)
            sequence = [self._prefix_token, *tokens]
            windows = rolling_windows(len(tokens), self._llm.max_model_len)
            parts = [
                self._score(sequence[start:stop], tokens[first:stop])[0]
                for start, first, stop in windows
            ]
            answers.append(float(sum(parts)))
        return answers

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        """For each (context, how): the text generated up to a stop string, eos or a length.

        Raises UsageError for keys of ``how`` that mean nothing here.
        """
        prompts, params, shortened = [], [], 0
        for request in requests:
            context, how = request.args
            sampling = sampling_of(how)
            room = self._llm.max_model_len - (sampling.max_tokens or 0)
            if room < 1:
                raise UsageError(
                    f"max_gen_toks={sampling.max_tokens} leaves no room for a prompt in the "
                    f"context of {self._llm.max_model_len} tokens"
                )
            tokens = self._with_bos(self._encode(context)) or [self._prefix_token]
            shortened += len(tokens) > room
            prompts.append(TokensPrompt(prompt_token_ids=tokens[-room:]))
            params.append(sampling)
        _warn_of(shortened)
        return [output.outputs[0].text for output in self._llm.generate(prompts, params)]

    # -- tokens ----------------------------------------------------------------------------------

    @property
    def _prefix_token(self) -> int:
        """What stands before a text that has no context: bos, else eos."""
        bos, eos = self._llm.tokenizer.assets.bos_token_id, self._llm.tokenizer.eos_token_ids
        if bos is None and not eos:
            raise UsageError("this model has neither a bos nor an eos token to begin a text with")
        return bos if bos is not None else eos[0]

    def _encode(self, text: str) -> list[int]:
        return self._llm.tokenizer.encode(text, add_special_tokens=False)

    def _with_bos(self, tokens: list[int]) -> list[int]:
        """``tokens`` after the bos token, where this model's tokenizer adds one."""
        bos = self._llm.tokenizer.assets.bos_token_id
        adds = bos is not None and self._llm.tokenizer.encode("a")[:1] == [bos]
        return [bos, *tokens] if adds and bos is not None and tokens[:1] != [bos] else tokens

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Both as tokens of their concatenation. Spaces between them go to the continuation, where
        tokenizers put them; an empty context is the prefix token."""
        if context == "":
            return [self._prefix_token], self._encode(continuation)
        stem = context.rstrip()
        whole = self._with_bos(self._encode(context + continuation))
        head = self._with_bos(self._encode(stem)) or [self._prefix_token]
        if not stem:  # nothing but spaces
            return head, whole[1:] if whole[:1] == head else whole
        return whole[: len(head)], whole[len(head) :]

    def _score(self, inputs: list[int], targets: list[int]) -> tuple[float, bool]:
        """log p of ``targets``, the last of which follows the last of ``inputs``."""
        if not targets:
            return 0.0, True
        logits = self._llm.forward_logits(inputs)[-len(targets) :]
        wanted = np.asarray(targets, np.int32)
        is_greedy = bool((logits.argmax(axis=1) == wanted).all())
        return -float(token_nll(logits, wanted).sum()), is_greedy


def rolling_windows(num_tokens: int, most: int) -> Iterator[tuple[int, int, int]]:
    """(start, first, stop) of each window over ``sequence``, a prefix token and ``num_tokens``
    tokens: ``sequence[start:stop]``, at most ``most`` inputs, predict ``tokens[first:stop]``."""
    for first in range(0, num_tokens, most):
        stop = min(first + most, num_tokens)
        yield max(0, stop - most), first, stop


def sampling_of(how: Mapping[str, Any]) -> SamplingParams:
    """The harness's ``gen_kwargs`` as sampling parameters. Raises UsageError for unknown keys."""
    unknown = sorted(set(how) - _GENERATION_KEYS)
    if unknown:
        raise UsageError(
            f"gen_kwargs {', '.join(unknown)} cannot be honoured; known are "
            f"{', '.join(sorted(_GENERATION_KEYS))}"
        )
    until = how.get("until") or ()
    temperature = how.get("temperature", 1.0 if how.get("do_sample") else 0.0)
    return SamplingParams(
        temperature=0.0 if how.get("do_sample") is False else temperature,
        top_p=how.get("top_p", 1.0),
        top_k=how.get("top_k", 0),
        max_tokens=how.get("max_gen_toks", DEFAULT_MAX_GEN_TOKS),
        stop=[until] if isinstance(until, str) else list(until),
    )


def harness_model(llm: LLM) -> HarnessAnswers:
    """``llm`` as an ``lm_eval.api.model.LM``. Raises UsageError where lm_eval is not installed."""
    try:
        base = importlib.import_module("lm_eval.api.model").LM
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.split(".")[0] != "lm_eval":
            raise  # lm_eval is there, and lacks something of its own
        raise UsageError(
            "lm-evaluation-harness is not installed; get it with: pip install 'sinterlm[eval]'"
        ) from exc
    model = types.new_class("SinterLM", (HarnessAnswers, base))(llm)
    assert isinstance(model, HarnessAnswers)
    return model


def _warn_of(shortened: int) -> None:
    if shortened:
        logging.getLogger("sinterlm").warning(
            "%d contexts were longer than the model's and lost their beginning", shortened
        )
