"""Sampling parameters: every bad value is refused by name; defaults come from the checkpoint."""

from __future__ import annotations

import math

import pytest

from sinterlm.engine.sampling import SamplingParams, default_sampling_params
from sinterlm.errors import UsageError

NAN, INF = math.nan, math.inf

BAD = {
    "n": [0, -1, True, 1.0, "1", None, 10**9],
    "temperature": [-0.1, NAN, INF, -INF, "hot", None, True, 1e39, 10**400],
    "top_p": [0, 0.0, 1e-46, 1e-300, -0.5, 1.01, NAN, INF, "1", False],
    "top_k": [-2, 1.5, True, "5", 2**31],
    "min_p": [-0.1, 1.1, NAN, None],
    "repetition_penalty": [0.0, 1e-300, -1.0, NAN, INF, True],
    "presence_penalty": [-2.1, 2.1, NAN],
    "frequency_penalty": [-2.1, 2.1, NAN, "0"],
    "seed": [-1, 2**64, 1.0, True, "seed"],
    "stop": [7, "", ["a", ""], ["a", 1], {"a": 1}, ["x"] * 65],
    "stop_token_ids": [5, [-1], [1.0], [True], ["a"], "12", [2**31]],
    "bad_words": [7, "", ["a", ""], ["a", 1], {"a": 1}, ["x"] * 257],
    "allowed_token_ids": [5, [], [-1], [1.0], [True], ["a"], "12", [2**31]],
    "min_tokens": [-1, 17, True, 1.5],  # 17 > max_tokens=16
    "max_tokens": [0, -5, True, 2.0, "16"],
    "logprobs": [-1, 21, True, 1.0],
    "ignore_eos": [1, None, "yes"],
    "logit_bias": [{1: NAN}, {1: INF}, {-1: 1.0}, {"1": 1.0}, {1: "2"}, {True: 1.0}, [1]],
    "skip_special_tokens": [0],
    "include_stop_str_in_output": [None],
    "detokenize": [1],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, vs in BAD.items() for v in vs])
def test_bad_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_boundary_values_are_taken() -> None:
    params = SamplingParams(
        n=3, temperature=0, top_p=1, top_k=-1, min_p=1.0, presence_penalty=-2, seed=2**64 - 1,
        stop="end", stop_token_ids=[5, 3, 5], allowed_token_ids=[5, 0, 5], min_tokens=16,
        logprobs=20, logit_bias={4: -INF, 2: 1},
    )  # fmt: skip
    assert params.stop == ("end",) and params.stop_ids == (3, 5)
    assert params.allowed_ids == (0, 5) and SamplingParams().allowed_ids is None
    assert params.logit_bias == {2: 1.0, 4: -INF}
    params.check_vocabulary(6)


def test_stop_strings_need_text() -> None:
    with pytest.raises(UsageError, match="stop"):
        SamplingParams(stop="x", detokenize=False)


@pytest.mark.parametrize(
    "given", [{"stop_token_ids": [6]}, {"logit_bias": {6: 1.0}}, {"allowed_token_ids": [1, 6]}]
)
def test_ids_beyond_the_vocabulary(given: dict[str, object]) -> None:
    params = SamplingParams(**given)  # type: ignore[arg-type]
    params.check_vocabulary(7)
    with pytest.raises(UsageError, match=r"=6 is out of range: .* 0 … 5"):
        params.check_vocabulary(6)


def test_defaults_of_generation_config() -> None:
    generation = {
        "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": None, "repetition_penalty": 1.1,
        "max_new_tokens": 99, "do_sample": True, "eos_token_id": [1, 2],
    }  # fmt: skip
    params = default_sampling_params(generation)
    assert params == SamplingParams(
        temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.1, max_tokens=99
    )
    assert default_sampling_params({}) == SamplingParams()


def test_unusable_default_names_the_file() -> None:
    with pytest.raises(UsageError, match=r"generation_config\.json.*top_p=7"):
        default_sampling_params({"top_p": 7})
