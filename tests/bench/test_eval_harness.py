"""The lm-evaluation-harness adapter, over a fake of the harness's base class and a tiny model."""

from __future__ import annotations

import abc
import logging
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinterlm import LLM, SamplingParams
from sinterlm.bench.eval_metrics import log_softmax
from sinterlm.bench.harness import HarnessAnswers, harness_model, rolling_windows, sampling_of
from sinterlm.errors import PromptError, UsageError
from tests.bench.conftest import TINY

CONTEXT = 48


class FakeBase(abc.ABC):
    """The constructor and abstract methods of ``lm_eval.api.model.LM``."""

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def loglikelihood_rolling(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(TINY), dtype="fp32", num_threads=1, max_model_len=CONTEXT) as opened:
        yield opened


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["lm_eval.api.model"], "LM", FakeBase, raising=False)


@pytest.fixture
def model(llm: LLM, harness: None) -> HarnessAnswers:
    return harness_model(llm)


def ask(*args: object) -> Any:
    return types.SimpleNamespace(args=args)


def test_it_is_a_model_of_the_harness(model: HarnessAnswers) -> None:
    assert isinstance(model, FakeBase)
    assert (model._rank, model._world_size) == (0, 1)


def test_without_the_harness(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"pip install 'sinterlm\[eval\]'"):
        harness_model(llm)


def plain(llm: LLM, text: str) -> list[int]:
    return llm.tokenizer.encode(text, add_special_tokens=False)


def logprobs_of(llm: LLM, ids: list[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """log p of each token but the first, by one whole pass."""
    rows = log_softmax(llm.forward_logits(ids[:-1]))
    return rows[np.arange(len(rows)), ids[1:]]


def test_loglikelihood(model: HarnessAnswers, llm: LLM) -> None:
    ((score, _),) = model.loglikelihood([ask("Call me", " Ishmael")])
    ids = llm.tokenizer.encode("Call me Ishmael")
    num_scored = len(ids) - len(llm.tokenizer.encode("Call me"))
    assert num_scored > 0
    assert score == pytest.approx(logprobs_of(llm, ids)[-num_scored:].sum(), rel=1e-6)


def test_spaces_belong_to_the_continuation(model: HarnessAnswers) -> None:
    one, other = model.loglikelihood([ask("Call me ", "Ishmael"), ask("Call me", " Ishmael")])
    assert one == other


def test_greedy_continuations_are_told(model: HarnessAnswers, llm: LLM) -> None:
    ids = plain(llm, "Call me")
    best = int(llm.forward_logits(ids)[-1].argmax())
    assert model._score(ids, [best])[1]
    assert not model._score(ids, [(best + 1) % 100])[1]


def test_no_context_is_the_prefix_token(model: HarnessAnswers, llm: LLM) -> None:
    ((score, _),) = model.loglikelihood([ask("", "Ishmael")])
    ids = [model._prefix_token, *plain(llm, "Ishmael")]
    assert score == pytest.approx(logprobs_of(llm, ids).sum(), rel=1e-6)


def test_long_contexts_lose_their_beginning(
    model: HarnessAnswers, llm: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "sinterlm"):
        ((score, _),) = model.loglikelihood([ask("the sea " * 100, " Ishmael")])
    assert "1 contexts" in caplog.text
    whole = plain(llm, "the sea " * 100 + " Ishmael")
    assert len(whole) > CONTEXT
    num_scored = len(whole) - len(plain(llm, ("the sea " * 100).rstrip()))
    kept = whole[-CONTEXT - 1 :]
    assert score == pytest.approx(logprobs_of(llm, kept)[-num_scored:].sum(), rel=1e-6)


def test_a_continuation_is_never_shortened(model: HarnessAnswers) -> None:
    with pytest.raises(PromptError, match="max_model_len is 48"):
        model.loglikelihood([ask("a", " sea" * 100)])


def test_rolling_is_the_sum_over_windows(model: HarnessAnswers, llm: LLM) -> None:
    short, long = "Call me Ishmael.", "Some years ago, never mind how long. " * 6
    one, other = model.loglikelihood_rolling([ask(short), ask(long)])
    assert one == pytest.approx(logprobs_of(llm, [model._prefix_token, *plain(llm, short)]).sum())
    tokens = plain(llm, long)
    assert len(tokens) > 2 * CONTEXT
    sequence, total = [model._prefix_token, *tokens], 0.0
    for first in range(0, len(tokens), CONTEXT):
        stop = min(first + CONTEXT, len(tokens))
        window = sequence[max(0, stop - CONTEXT) : stop + 1]
        total += logprobs_of(llm, window)[first - stop :].sum()
    assert other == pytest.approx(total)


def test_rolling_windows_are_the_harnesss_own_example() -> None:
    """Ten tokens, context four: as its documentation of ``loglikelihood_rolling`` lists them."""
    sequence = ["bos", *range(10)]
    pairs = [(sequence[a:c], list(range(b, c))) for a, b, c in rolling_windows(10, 4)]
    assert pairs == [
        (["bos", 0, 1, 2], [0, 1, 2, 3]),
        ([3, 4, 5, 6], [4, 5, 6, 7]),
        ([5, 6, 7, 8], [8, 9]),
    ]


@given(st.integers(0, 60), st.integers(1, 20))
def test_rolling_windows_predict_each_token_once(num_tokens: int, most: int) -> None:
    predicted: list[int] = []
    for start, first, stop in rolling_windows(num_tokens, most):
        assert 0 < stop - start <= most and start <= first
        predicted += range(first, stop)
    assert predicted == list(range(num_tokens))


def test_generate_until(model: HarnessAnswers, llm: LLM) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=8)
    free = llm.generate("Call me", greedy)[0].outputs[0].text
    assert model.generate_until([ask("Call me", {"until": [], "max_gen_toks": 8})]) == [free]
    stop = free[len(free) // 2]
    cut = model.generate_until([ask("Call me", {"until": stop, "max_gen_toks": 8})])
    assert cut == [free.split(stop)[0]]


def test_how_to_generate() -> None:
    params = sampling_of({"until": ["\n\n", "Q:"], "do_sample": False, "temperature": 0.7})
    assert params.temperature == 0.0 and params.stop_strings == ("\n\n", "Q:")
    assert params.max_tokens == 256
    assert sampling_of({"do_sample": True}).temperature == 1.0
    assert sampling_of({}).temperature == 0.0
    assert sampling_of({"temperature": 0.3, "top_p": 0.5, "top_k": 4}).top_k == 4
    with pytest.raises(UsageError, match="num_beams"):
        sampling_of({"num_beams": 4})


def test_no_room_to_generate(model: HarnessAnswers) -> None:
    with pytest.raises(UsageError, match=f"max_gen_toks={CONTEXT}"):
        model.generate_until([ask("Call me", {"max_gen_toks": CONTEXT})])
