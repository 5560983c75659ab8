"""allowed_token_ids: nothing else is drawn, and nothing else about the answer changes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sinterlm.engine.outputs import CompletionOutput
from sinterlm.engine.sampling import SamplingParams
from sinterlm.errors import UsageError
from sinterlm.runtime.batch import token_mask
from tests.engine.fakes import make_engine
from tests.engine.test_engine import EOS, run, text_engine

VOCAB = 97  #: of the fake model
IDS = [3, 31, 32, 64, 96]
FORBIDDEN = dict.fromkeys(sorted(set(range(VOCAB)) - set(IDS)), -math.inf)


def test_the_mask_is_a_bit_per_token() -> None:
    mask = token_mask(IDS, VOCAB)
    assert mask.dtype == np.uint32 and mask.tolist() == [1 << 3 | 1 << 31, 1, 1, 1]
    assert token_mask([], 33).tolist() == [0, 0]


def answer(**fields: object) -> CompletionOutput:
    """Of an engine that guesses and takes several steps in a call, where it may."""
    engine = make_engine(num_speculative_tokens=3, num_scheduler_steps=8)
    params = SamplingParams(max_tokens=40, ignore_eos=True, seed=5, **fields)  # type: ignore[arg-type]
    return run(engine, params)[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_the_same_as_forbidding_every_other_token(temperature: float, penalty: float) -> None:
    fields = {"temperature": temperature, "frequency_penalty": penalty}
    listed = answer(allowed_token_ids=IDS, **fields)
    assert listed == answer(logit_bias=FORBIDDEN, **fields)
    assert set(listed.token_ids) <= set(IDS)


def test_steps_in_one_call_keep_to_the_list() -> None:
    engine = make_engine()
    params = SamplingParams(max_tokens=17, temperature=0, ignore_eos=True, allowed_token_ids=IDS)
    engine.add_request("r", [1, 2], params)
    calls = []
    while engine.has_unfinished:
        calls.append(engine.step(max_steps=8))
    assert [len(call) for call in calls] == [1, 8, 8]
    drawn = [token for call in calls for delta in call for token in delta.token_ids]
    assert tuple(drawn) == run(make_engine(), params, prompt=(1, 2))[0].token_ids


def test_an_end_token_must_be_named() -> None:
    engine = text_engine()
    params = SamplingParams(max_tokens=300, allowed_token_ids=[5, 6])
    assert run(engine, params)[0].finish_reason == "length"
    params = SamplingParams(max_tokens=300, allowed_token_ids=[5, 6, EOS], min_tokens=3)
    done = run(engine, params)[0]
    assert done.finish_reason == "stop" and set(done.token_ids[:3]) <= {5, 6}


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": [EOS], "min_tokens": 2},
        {"allowed_token_ids": [7], "stop_token_ids": [7], "min_tokens": 1},
        {"allowed_token_ids": [7, 8], "logit_bias": {7: -math.inf, 8: -math.inf}},
    ],
)
def test_nothing_left_to_draw_is_refused(fields: dict[str, object]) -> None:
    engine = text_engine()
    with pytest.raises(UsageError, match="allowed_token_ids has no token") as refused:
        engine.add_request("r", [1], SamplingParams(**fields))  # type: ignore[arg-type]
    assert refused.value.field == "allowed_token_ids"
