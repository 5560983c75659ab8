"""Every field of the OpenAPI document: a non-neutral value has an observable effect, or is a 400
that names the field, or the field is in the table of those that cannot matter.
"""

from __future__ import annotations

import json
import runpy
from typing import Any

import pytest

from sinterlm.engine.tokenizer import Tokenizer
from sinterlm.options import ServeOptions
from sinterlm.serve.openapi import openapi_document
from sinterlm.serve.protocol.chat import ChatRequest
from sinterlm.serve.protocol.completion import CompletionRequest
from sinterlm.serve.protocol.fields import Status, rules_of
from sinterlm.serve.protocol.tokens import DetokenizeRequest, TokenizeRequest
from tests.conftest import ROOT
from tests.engine.texts import chat_assets
from tests.serve.conftest import TEMPLATE, MakeServer, Server, chat_body

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "w"}]

#: Field -> a body that gives it a value which asks for something, beside what it needs.
BOTH: dict[str, dict[str, Any]] = {
    "model": {"model": "alias"},
    "stream": {"stream": True},
    "stream_options": {"stream": True, "stream_options": {"include_usage": True}},
    "n": {"n": 2},
    "temperature": {"temperature": 0.5},
    "top_p": {"top_p": 0.5},
    "top_k": {"top_k": 5},
    "min_p": {"min_p": 0.1},
    "seed": {"seed": 7},
    "presence_penalty": {"presence_penalty": 1},
    "frequency_penalty": {"frequency_penalty": 1},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "logit_bias": {"logit_bias": {"5": 3}},
    "stop": {"stop": "o w"},
    "stop_token_ids": {"stop_token_ids": [259]},
    "bad_words": {"bad_words": ["a", "o"]},
    "allowed_token_ids": {"allowed_token_ids": [5, 6]},
    "include_stop_str_in_output": {"stop": "o w", "include_stop_str_in_output": True},
    "ignore_eos": {"ignore_eos": True, "max_tokens": 12},
    "min_tokens": {"min_tokens": 3},
    "skip_special_tokens": {"skip_special_tokens": False},
    "prompt_logprobs": {"prompt_logprobs": 1},
    "add_special_tokens": {"add_special_tokens": True},
    "truncate_prompt_tokens": {"truncate_prompt_tokens": 1},
    "truncation_side": {"truncate_prompt_tokens": 2, "truncation_side": "right"},
    "response_format": {"response_format": {"type": "json_object"}},
    "structured_outputs": {"structured_outputs": {"regex": "a+"}},
    "guided_json": {"guided_json": SCHEMA},
    "guided_regex": {"guided_regex": "a+"},
    "guided_choice": {"guided_choice": ["a", "b"]},
    "guided_grammar": {"guided_grammar": 'start: "a"'},
    "guided_whitespace_pattern": {"guided_json": SCHEMA, "guided_whitespace_pattern": " "},
    "priority": {"priority": -1},
    "cache_salt": {"cache_salt": "pepper"},
    "request_id": {"request_id": "mine"},
    "return_token_ids": {"return_token_ids": True},
    "return_tokens_as_token_ids": {"return_tokens_as_token_ids": True, "logprobs": 1},
}
CHAT: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": "other"}]},
    "max_completion_tokens": {"max_completion_tokens": 2},
    "max_tokens": {"max_tokens": 2},
    "logprobs": {"logprobs": True},
    "top_logprobs": {"logprobs": True, "top_logprobs": 2},
    "tools": {"tools": [TOOL]},
    "tool_choice": {"tools": [TOOL], "tool_choice": "required"},
    "parallel_tool_calls": {"tools": [TOOL], "tool_choice": "required",
                            "parallel_tool_calls": False},
    "reasoning_effort": {"reasoning_effort": "none"},
    "include_reasoning": {"include_reasoning": False},
    "add_generation_prompt": {"add_generation_prompt": False},
    "continue_final_message": {"messages": MESSAGES, "continue_final_message": True},
    "chat_template": {"chat_template": "{{ messages[0].content }}"},
    "chat_template_kwargs": {"chat_template_kwargs": {"enable_thinking": False}},
    "documents": {"documents": [{"text": "d"}]},
    "return_tokens_as_token_ids": {"return_tokens_as_token_ids": True, "logprobs": True},
}  # fmt: skip
COMPLETION: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "hello w"},
    "max_tokens": {"max_tokens": 2},
    "logprobs": {"logprobs": 1},
    "echo": {"echo": True},
    "best_of": {"best_of": 3},
    "add_special_tokens": {"add_special_tokens": False},
    "truncate_prompt_tokens": {"prompt": [1, 2, 3], "truncate_prompt_tokens": 1},
    "truncation_side": {"prompt": [1, 2, 3], "truncate_prompt_tokens": 2,
                        "truncation_side": "right"},
}  # fmt: skip
#: A field -> what it is compared with, where that is not the plain request.
AGAINST: dict[str, tuple[str, ...]] = {
    "stream_options": ("stream",),
    "include_stop_str_in_output": ("stop",),
    "ignore_eos": ("max_tokens",),
    "truncation_side": ("truncate_prompt_tokens", "prompt"),
    "truncate_prompt_tokens": ("prompt",),
    "guided_whitespace_pattern": ("guided_json",),
    "return_tokens_as_token_ids": ("logprobs",),
    "top_logprobs": ("logprobs",),
    "tool_choice": ("tools",),
    "parallel_tool_calls": ("tools", "tool_choice"),
    "continue_final_message": ("messages",),
}
#: What a refused field that takes one type is asked for; the others get an object.
WRONG: dict[str, Any] = {
    "store": True, "use_beam_search": True, "length_penalty": 2.0, "stream_interval": 4,
    "spaces_between_special_tokens": False, "watermarking": True, "return_token_offsets": True,
    "echo": True, "return_prompt_text": True, "suffix": "end",
}  # fmt: skip
HARMLESS: dict[str, Any] = {"metadata": {"a": "b"}, "prediction": {"type": "content"}}

ENDPOINTS = {
    "ChatRequest": ("/v1/chat/completions", CHAT),
    "CompletionRequest": ("/v1/completions", COMPLETION),
}
FIELDS = [
    (kind, name)
    for kind in ENDPOINTS
    for name in openapi_document(dev_mode=False)["components"]["schemas"][kind]["properties"]
]
STATUS = {
    kind.__name__: {rule.name: rule.status for rule in rules_of(kind)}
    for kind in (ChatRequest, CompletionRequest)
}


def observed(server: Server, path: str, body: dict[str, Any]) -> tuple[Any, ...]:
    """Everything a request brought about, less what differs by chance."""
    base = chat_body() if "chat" in path else {"prompt": "hello"}
    answer = server.post(path, {**base, **body})
    if answer.status != 200:
        return (answer.status, answer.error["param"])
    text = answer.body.decode()
    for submission in server.bridge.submissions:
        request_id = submission.request_id.rsplit("-", 1)[0]
        text = text.replace(request_id, "" if "mine" not in request_id else request_id)
    shown = [line.split('"created"')[0] + line.split('"model"')[-1] for line in text.split("\n")]
    what = [
        (tuple(s.prompt_token_ids), s.params, s.priority, s.cache_salt)
        for s in server.bridge.submissions
    ]
    server.bridge.submissions.clear()
    return (200, shown, what)


def body_of(kind: str, name: str, rules: dict[str, Any]) -> dict[str, Any]:
    return rules.get(name) or BOTH[name]


@pytest.fixture
def able(make_server: MakeServer) -> Server:
    """A server on which every field can have its effect."""
    server = make_server(
        tool_parser="hermes",
        reasoning_parser="qwq",
        tokenizer=Tokenizer(chat_assets(post_bos=True, chat_template=TEMPLATE)),
        options=ServeOptions(trust_request_chat_template=True),
    )
    server.bridge.script = lambda *_: "why</think>hello world"
    return server


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_every_field_does_what_the_table_says(able: Server, kind: str, name: str) -> None:
    path, rules = ENDPOINTS[kind]
    status = STATUS[kind][name]
    if status is Status.REFUSED:
        value = WRONG.get(name, {"x": 1})
        assert observed(able, path, {name: value}) == (400, name)
        return
    if status is Status.ACCEPTED:
        plain = observed(able, path, {})
        assert observed(able, path, {name: HARMLESS.get(name, "x")}) == plain
        return
    body = body_of(kind, name, rules)
    against = {key: body[key] for key in AGAINST.get(name, ()) if key in body}
    before, after = observed(able, path, against), observed(able, path, body)
    assert before[0] == 200, before
    assert after != before
    assert after[0] == 200 or after == (400, name)


@pytest.mark.parametrize("kind", ["ChatRequest", "CompletionRequest"])
def test_null_asks_for_nothing(able: Server, kind: str) -> None:
    path, _ = ENDPOINTS[kind]
    plain = observed(able, path, {})
    for name in STATUS[kind]:
        if name not in ("messages", "prompt"):
            assert observed(able, path, {name: None}) == plain, name


@pytest.mark.parametrize(
    ("path", "name", "body", "against"),
    [
        ("/tokenize", "prompt", {"prompt": "b"}, {"prompt": "a"}),
        ("/tokenize", "model", {"prompt": "a", "model": "x"}, {"prompt": "a"}),
        ("/tokenize", "add_special_tokens", {"messages": MESSAGES, "add_special_tokens": True},
         {"messages": MESSAGES}),
        ("/tokenize", "return_token_strs", {"prompt": "a", "return_token_strs": True},
         {"prompt": "a"}),
        ("/tokenize", "messages", {"messages": MESSAGES}, {"messages": MESSAGES[:1]}),
        ("/tokenize", "tools", {"messages": MESSAGES, "tools": [TOOL]}, {"messages": MESSAGES}),
        ("/tokenize", "add_generation_prompt",
         {"messages": MESSAGES, "add_generation_prompt": False}, {"messages": MESSAGES}),
        ("/tokenize", "continue_final_message",
         {"messages": MESSAGES, "continue_final_message": True}, {"messages": MESSAGES}),
        ("/tokenize", "chat_template", {"messages": MESSAGES, "chat_template": "x"},
         {"messages": MESSAGES}),
        ("/tokenize", "chat_template_kwargs",
         {"messages": MESSAGES, "chat_template_kwargs": {"enable_thinking": True}},
         {"messages": MESSAGES}),
        ("/detokenize", "tokens", {"tokens": [70]}, {"tokens": [71]}),
        ("/detokenize", "model", {"tokens": [70], "model": "x"}, {"tokens": [70]}),
    ],
)  # fmt: skip
def test_fields_of_tokenize(
    make_server: MakeServer, path: str, name: str, body: Any, against: Any
) -> None:
    server = make_server(
        options=ServeOptions(trust_request_chat_template=True),
        tokenizer=Tokenizer(chat_assets(post_bos=True, chat_template=TEMPLATE)),
    )
    assert name in {r.name for k in (TokenizeRequest, DetokenizeRequest) for r in rules_of(k)}
    assert server.post(path, body).body != server.post(path, against).body


def test_the_document_is_served_and_complete(server: Server) -> None:
    document = server.get("/openapi.json").json
    assert document["openapi"].startswith("3.1")
    text = json.dumps(document)
    for name in set(document["components"]["schemas"]):
        assert f"#/components/schemas/{name}" in text
    assert "/reset_prefix_cache" not in document["paths"]
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        assert document["paths"][path]["post"]["requestBody"]["required"]


def test_the_document_says_what_a_refused_field_takes() -> None:
    schemas = openapi_document(dev_mode=False)["components"]["schemas"]
    for kind in (ChatRequest, CompletionRequest):
        for rule in rules_of(kind):
            taken = schemas[kind.__name__]["properties"][rule.name].get("enum")
            refused = rule.status is Status.REFUSED
            assert taken == ([None, *rule.neutral] if refused else None), rule.name


def test_docs_hold_the_table() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    script = runpy.run_path(str(ROOT / "scripts" / "api_docs.py"))
    assert script["rewritten"](page) == page, "run scripts/api_docs.py"
