"""The prompts: the same as vLLM's own for the same seed, and files that are refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripts.vllm_datasets import ARRIVALS, GOLDENS, PREFIX, RANDOM, rows, sharegpt

from sinterlm.bench import datasets
from sinterlm.bench.datasets import PrefixShape, RandomShape, Sampling
from sinterlm.bench.workload import Load, Ramp, Request, arrival_times, conversations
from sinterlm.commands.bench.tokenizer import tokenizer_of
from sinterlm.engine.tokenizer import Tokenizer
from sinterlm.errors import UsageError


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return tokenizer_of("smollm2")


@pytest.fixture(scope="module")
def goldens() -> dict[str, Any]:
    return dict(json.loads(GOLDENS.read_text()))


class _Row:
    def __init__(self, request: Request) -> None:
        self.prompt, self.prompt_len = request.prompt, request.prompt_len
        self.expected_output_len = request.output_len


def drawn(requests: list[Request]) -> list[list[Any]]:
    return rows([_Row(request) for request in requests])


@pytest.mark.parametrize("case", range(len(RANDOM)))
def test_random_prompts_are_vllms(case: int, smollm2: Tokenizer, goldens: dict[str, Any]) -> None:
    seed, count, given = RANDOM[case]
    shape = dict(given)
    ratio = shape.pop("range_ratio", 0.0)
    pair = (ratio["input"], ratio["output"]) if isinstance(ratio, dict) else (ratio, ratio)
    shape |= {"input_range_ratio": pair[0], "output_range_ratio": pair[1]}
    found = datasets.random_requests(smollm2, RandomShape(**shape), Sampling(count, seed))
    assert drawn(found) == goldens["random"][case]
    for request in found:
        assert smollm2.encode(request.prompt, add_special_tokens=False) == list(
            request.token_ids or ()
        )


def test_prefix_prompts_are_vllms(smollm2: Tokenizer, goldens: dict[str, Any]) -> None:
    for (seed, count, shape), expected in zip(PREFIX, goldens["prefix"], strict=True):
        found = datasets.prefix_requests(smollm2, PrefixShape(**shape), Sampling(count, seed))
        assert drawn(found) == expected


def test_sharegpt_prompts_are_vllms(
    smollm2: Tokenizer, goldens: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(sharegpt()))
    found = datasets.sharegpt_requests(smollm2, path, Sampling(14, 4))
    assert drawn(found) == goldens["sharegpt"]


@pytest.mark.parametrize("case", range(len(ARRIVALS)))
def test_arrivals_are_vllms(case: int, goldens: dict[str, Any]) -> None:
    how = dict(ARRIVALS[case])
    ramp = Ramp(*how.pop("ramp")) if "ramp" in how else None
    times = arrival_times([Request("", "", 1, 1)] * 10, Load(**how, ramp=ramp))
    assert times == pytest.approx(goldens["arrivals"][case], rel=1e-12)


def test_arrivals() -> None:
    ten = [Request("", "", 1, 1, at_s=0.5 * i) for i in range(10)]
    assert arrival_times(ten, Load()) == [0.0] * 10
    assert arrival_times(ten, Load(use_trace_times=True))[3] == 1.5
    even = arrival_times(ten, Load(request_rate=5.0, burstiness=float("inf")))
    assert even == pytest.approx([0.2 * (i + 1) for i in range(10)])
    poisson = arrival_times([*ten] * 200, Load(request_rate=5.0))
    assert poisson[-1] == pytest.approx(400)
    gaps = np.diff(poisson)
    assert np.std(gaps) == pytest.approx(np.mean(gaps), rel=0.1)
    rising = arrival_times(ten, Load(ramp=Ramp("linear", 1, 10), burstiness=float("inf")))
    assert np.all(np.diff(np.diff(rising)) < 0)


def test_the_frozen_trace(smollm2: Tokenizer) -> None:
    made = datasets.trace_requests(smollm2, datasets.FROZEN_TRACE, Sampling(256))
    again = datasets.trace_requests(smollm2, datasets.FROZEN_TRACE, Sampling(256))
    assert made == again
    assert len({request.prompt for request in made}) == 256
    assert len(Counter(request.prompt_len for request in made)) > 50
    times = [request.at_s or 0 for request in made]
    assert times == sorted(times)


def test_blocks_of_a_trace_are_shared(smollm2: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    entry = {"timestamp": 0, "input_length": 40, "output_length": 4}
    lines = [{**entry, "hash_ids": [1, 2, 3]}, {**entry, "hash_ids": [1, 2, 9]}]
    path.write_text("\n".join(map(json.dumps, lines)))
    first, second = datasets.trace_requests(smollm2, path, Sampling(2))
    assert first.token_ids is not None and second.token_ids is not None
    assert first.token_ids[:32] == second.token_ids[:32]
    assert first.token_ids[32:] != second.token_ids[32:]


def test_text_and_conversations(smollm2: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one two three four five six seven eight nine ten " * 3)
    made = datasets.text_requests(smollm2, path, 8, Sampling(5, output_len=7))
    assert [request.prompt_len for request in made] == [8] * 5
    assert made[0].prompt.startswith("one two")
    assert made[0].output_len == 7
    turns = datasets.multi_turn_requests(smollm2, None, 2, RandomShape(6, 3), Sampling(5))
    assert conversations(turns) == [[0, 1], [2, 3], [4]]
    file = tmp_path / "talk.json"
    talk = [{"from": "x", "value": f"say {i}"} for i in range(5)]
    file.write_text(json.dumps([{"conversations": talk}] * 2))
    asked = datasets.multi_turn_requests(smollm2, file, 9, RandomShape(), Sampling(4))
    assert [request.prompt for request in asked] == ["say 0", "say 2"] * 2


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("sharegpt", "[1]", "no ShareGPT file"),
        ("sharegpt", "[]", "no conversation"),
        ("text", "short", "fewer than"),
        ("trace", "{}", "line 1"),
        ("trace", '{"timestamp": 0, "input_length": 2, "output_length": 1}', "1 lines"),
        ("trace", '{"timestamp": 0, "input_length": 0, "output_length": 1}', "lengths"),
        ("multi", "[]", "0 questions"),
    ],
)
def test_refused(smollm2: Tokenizer, tmp_path: Path, name: str, content: str, told: str) -> None:
    path = tmp_path / "file"
    path.write_text(content)
    how = Sampling(3)
    with pytest.raises(UsageError, match=told):
        if name == "sharegpt":
            datasets.sharegpt_requests(smollm2, path, how)
        elif name == "text":
            datasets.text_requests(smollm2, path, 64, how)
        elif name == "multi":
            datasets.multi_turn_requests(smollm2, path, 2, RandomShape(), how)
        else:
            datasets.trace_requests(smollm2, path, how)


def test_shapes_are_refused(smollm2: Tokenizer) -> None:
    with pytest.raises(UsageError, match="range-ratio"):
        RandomShape(input_range_ratio=1.0)
    with pytest.raises(UsageError, match="without a token"):
        datasets.random_requests(smollm2, RandomShape(0, 1), Sampling(1))
    with pytest.raises(UsageError, match="num-prefixes"):
        datasets.prefix_requests(smollm2, PrefixShape(), Sampling(3))
