"""bad_words: no word is completed, and otherwise the answer is what it would have been."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinterlm.engine import admission
from sinterlm.engine.bad_words import BadWords, read_bad_words
from sinterlm.engine.engine import Engine
from sinterlm.engine.sampling import SamplingParams
from sinterlm.errors import UsageError
from tests.engine.fakes import draw, make_engine
from tests.engine.test_engine import run, script, text_engine

VOCAB = 11
Words = Sequence[tuple[int, ...]]

words = st.lists(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3).map(tuple), min_size=1, max_size=12
).filter(lambda made: len({word[-1] for word in made}) < VOCAB - 2)


def barred(sequences: Words, output: Sequence[int]) -> set[int]:
    """The rule in the words of vLLM's sampler."""
    found = set()
    for word in sequences:
        length = len(word) - 1
        if length <= len(output) and list(output[len(output) - length :]) == list(word[:-1]):
            found.add(word[-1])
    return found


@given(words, st.lists(st.integers(0, VOCAB - 1), max_size=8))
def test_the_rule(sequences: Words, output: list[int]) -> None:
    rules = BadWords(sequences)
    assert rules.always | rules.barred(np.array(output, np.int32)) == barred(sequences, output)
    assert rules.sometimes == {word[-1] for word in sequences}
    assert rules.changes == any(len(word) > 1 for word in sequences)


def answer(engine: Engine, params: SamplingParams, max_steps: int) -> tuple[int, ...]:
    engine.add_request("r", [1, 2, 1, 2], params)
    deltas = []
    while engine.has_unfinished:
        deltas += engine.step(max_steps=max_steps)
    return tuple(token for delta in deltas for token in delta.token_ids)


@given(
    words, st.integers(0, 9), st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 0.5]),
    st.sampled_from([None, {2: -math.inf, 3: 1.0}]),
)  # fmt: skip
def test_every_way_of_stepping_draws_what_one_by_one_would_be_drawn(
    sequences: Words,
    seed: int,
    temperature: float,
    penalty: float,
    logit_bias: dict[int, float] | None,
) -> None:
    params = SamplingParams(
        max_tokens=20, ignore_eos=True, seed=seed, temperature=temperature,
        frequency_penalty=penalty, logit_bias=logit_bias,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(admission, "read_bad_words", lambda *_: BadWords(sequences))
        plain = make_engine(vocab_size=VOCAB)
        plain.add_request("truth", [1, 2, 1, 2], params)
        row = plain._groups["truth"].requests[0].row
        expected: list[int] = []
        while len(expected) < 20:
            bias = dict(logit_bias or {}) | dict.fromkeys(barred(sequences, expected), -math.inf)
            at = replace(
                row,
                bias_ids=np.array(list(bias), np.int32),
                bias=np.array(list(bias.values()), np.float32),
            )
            expected.append(draw([1, 2, 1, 2, *expected], VOCAB, at))
        for guesses, max_steps in ((0, 1), (3, 1), (0, 8)):
            engine = make_engine(vocab_size=VOCAB, num_speculative_tokens=guesses)
            assert answer(engine, params, max_steps) == tuple(expected)


def test_words_are_read_at_the_beginning_and_after_a_blank() -> None:
    engine = text_engine()
    script(engine, "no bad bad badly")
    done, _, _ = run(engine, SamplingParams(max_tokens=16, bad_words=[" bad"]))
    assert "bad" not in done.text and done.text.startswith("no ba")
    encode = engine.tokenizer.encode
    rules = read_bad_words(["bad", "b"], engine.tokenizer, 300)
    assert rules is not None
    assert rules.always == {*encode("b", add_special_tokens=False)}
    assert read_bad_words([], engine.tokenizer, 300) is None


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"bad_words": ["   "]}, "bad_words='   ' holds no token"),
        ({"bad_words": ["ab"], "allowed_token_ids": "b"}, "allowed_token_ids has no token"),
    ],
)
def test_what_cannot_be_kept_is_refused(fields: dict[str, object], match: str) -> None:
    engine = text_engine()
    if "allowed_token_ids" in fields:
        fields = {**fields, "allowed_token_ids": engine.tokenizer.encode("b")}
    with pytest.raises(UsageError, match=match):
        engine.add_request("r", [1], SamplingParams(**fields))  # type: ignore[arg-type]
