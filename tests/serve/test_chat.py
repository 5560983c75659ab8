"""Chat completions: whole answers, streams, tools, reasoning, and rendered conversations."""

from __future__ import annotations

from typing import Any

import pytest

from sinterlm.engine.structured import Reasoning
from tests.serve.conftest import MakeServer, Server, chat_body

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}},
}


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


def prompt_of(server: Server) -> str:
    return server.bridge.submissions[-1].prompt or ""


def message(answer: Any, choice: int = 0) -> dict[str, Any]:
    assert answer.status == 200, answer.body
    return answer.json["choices"][choice]["message"]


def joined(answer: Any) -> dict[str, Any]:
    """A stream's deltas put together again."""
    whole: dict[str, Any] = {"content": "", "reasoning": "", "calls": {}, "finish": None}
    for event in answer.events:
        for choice in event["choices"]:
            delta = choice["delta"]
            whole["content"] += delta.get("content") or ""
            whole["reasoning"] += delta.get("reasoning") or ""
            assert delta.get("reasoning") == delta.get("reasoning_content")
            for call in delta.get("tool_calls", []):
                known = whole["calls"].setdefault(call["index"], {"arguments": ""})
                known |= {k: v for k, v in call["function"].items() if k == "name"}
                known["arguments"] += call["function"]["arguments"]
            whole["finish"] = choice["finish_reason"] or whole["finish"]
    return whole


class TestWhole:
    def test_the_answer_has_openai_s_shape(self, server: Server) -> None:
        answer = server.chat().json
        assert answer["id"].startswith("chatcmpl-")
        assert answer["object"] == "chat.completion" and answer["model"] == "tiny"
        (choice,) = answer["choices"]
        assert choice == {
            "index": 0,
            "message": {"role": "assistant", "content": "hello world"},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
        assert answer["usage"]["completion_tokens"] == 7
        prompt = len(server.bridge.submissions[0].prompt_token_ids)
        assert answer["usage"]["prompt_tokens"] == prompt
        assert answer["usage"]["total_tokens"] == prompt + 7

    def test_the_default_length_is_what_the_context_has_room_for(self, server: Server) -> None:
        server.chat()
        assert server.bridge.submissions[0].params.max_tokens is None

    def test_n_answers_come_in_order(self, server: Server) -> None:
        server.bridge.script = lambda _, index: f"he{index}"
        answer = server.chat({"n": 3}).json
        assert [c["message"]["content"] for c in answer["choices"]] == ["he0", "he1", "he2"]
        assert [c["index"] for c in answer["choices"]] == [0, 1, 2]

    def test_logprobs(self, server: Server) -> None:
        answer = server.chat({"logprobs": True, "top_logprobs": 2, "max_tokens": 1}).json
        (entry,) = answer["choices"][0]["logprobs"]["content"]
        assert entry["token"] == "hello" and entry["bytes"] == list(b"hello")
        assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.5, -1.0]

    def test_half_a_character_has_no_bytes(self, server: Server) -> None:
        server.bridge.script = lambda *_: "😀"
        content = server.chat({"logprobs": True}).json["choices"][0]["logprobs"]["content"]
        assert content[0]["bytes"] is None

    def test_cached_tokens_are_told(self, server: Server) -> None:
        server.bridge.cached = 5
        assert server.chat().json["usage"]["prompt_tokens_details"] == {"cached_tokens": 5}


class TestStream:
    def test_each_event_is_one_token_and_the_first_has_the_role(self, server: Server) -> None:
        events = server.chat({"stream": True}).events
        assert len(events) == 7  # six tokens of text and the one that ends it
        assert events[0]["choices"] == [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": "hello"},
                "logprobs": None,
                "finish_reason": None,
            }
        ]
        assert "role" not in events[1]["choices"][0]["delta"]
        assert events[-1]["choices"][0]["finish_reason"] == "stop"
        assert len({event["id"] for event in events}) == 1
        assert {event["object"] for event in events} == {"chat.completion.chunk"}

    def test_usage_is_an_event_of_its_own(self, server: Server) -> None:
        events = server.chat({"stream": True, "stream_options": {"include_usage": True}}).events
        assert events[-1]["choices"] == []
        assert events[-1]["usage"]["completion_tokens"] == 7
        assert all("usage" not in event for event in events[:-1])

    def test_usage_may_be_in_every_event(self, server: Server) -> None:
        options = {"continuous_usage_stats": True}
        events = server.chat({"stream": True, "stream_options": options}).events
        assert [e["usage"]["completion_tokens"] for e in events] == [1, 2, 3, 4, 5, 6, 7]

    def test_an_incomplete_character_is_an_event_without_text(self, server: Server) -> None:
        server.bridge.script = lambda *_: "😀"
        events = server.chat({"stream": True}).events
        texts = [event["choices"][0]["delta"]["content"] for event in events]
        assert "".join(texts) == "😀" and texts[0] == ""

    def test_every_choice_has_its_role_once(self, server: Server) -> None:
        events = server.chat({"stream": True, "n": 2}).events
        roles = [e["choices"][0]["index"] for e in events if "role" in e["choices"][0]["delta"]]
        assert roles == [0, 1]

    def test_token_ids(self, server: Server) -> None:
        events = server.chat({"stream": True, "return_token_ids": True}).events
        submission = server.bridge.submissions[0]
        assert events[0]["prompt_token_ids"] == list(submission.prompt_token_ids)
        assert all(len(e["choices"][0]["token_ids"]) == 1 for e in events)


class TestReasoning:
    @pytest.mark.parametrize("stream", [False, True])
    def test_qwq_starts_inside(self, make_server: MakeServer, stream: bool) -> None:
        server = make_server(reasoning_parser="qwq")
        server.bridge.script = lambda *_: "so it is\n</think>\n\nhello"
        body = {"stream": stream, "chat_template_kwargs": {"open_thinking": True}}
        answer = server.chat(body)
        assert prompt_of(server).endswith("<think>\n")
        got = joined(answer) if stream else message(answer)
        assert got["reasoning"].strip() == "so it is" and got["content"].strip() == "hello"

    def test_older_clients_find_the_older_field(self, make_server: MakeServer) -> None:
        server = make_server(reasoning_parser="qwq")
        server.bridge.script = lambda *_: "so</think>hello"
        got = message(server.chat())
        assert got["reasoning"] == got["reasoning_content"] == "so"

    def test_reasoning_tokens_are_counted(self, make_server: MakeServer) -> None:
        server = make_server(reasoning_parser="qwq")
        server.bridge.script = lambda *_: "abc</think>hello"
        for body in ({}, {"stream": True, "stream_options": {"include_usage": True}}):
            answer = server.chat(body)
            usage = answer.events[-1]["usage"] if body else answer.json["usage"]
            assert usage["completion_tokens_details"] == {"reasoning_tokens": 3}

    @pytest.mark.parametrize("stream", [False, True])
    def test_it_can_be_left_out(self, make_server: MakeServer, stream: bool) -> None:
        server = make_server(reasoning_parser="qwq")
        server.bridge.script = lambda *_: "so</think>hello"
        answer = server.chat({"include_reasoning": False, "stream": stream})
        got = joined(answer) if stream else message(answer)
        assert got["content"] == "hello" and not got.get("reasoning")

    def test_only_reasoning_leaves_content_null(self, make_server: MakeServer) -> None:
        server = make_server(reasoning_parser="qwq")
        server.bridge.script = lambda *_: "thinking on and on"
        assert message(server.chat({"max_tokens": 4}))["content"] is None

    @pytest.mark.parametrize(
        ("parser", "variables", "expected"),
        [
            ("qwq", {}, Reasoning(9)),
            ("qwen3", {}, Reasoning(9, 8)),
            ("qwen3", {"open_thinking": True}, Reasoning(9)),
        ],
    )
    def test_a_constraint_waits_for_it(
        self, make_server: MakeServer, parser: str, variables: dict[str, Any], expected: Reasoning
    ) -> None:
        server = make_server(reasoning_parser=parser, think_tokens=(8, 9))
        server.bridge.script = lambda *_: "<think>so</think>{}"
        body = {"response_format": {"type": "json_object"}, "chat_template_kwargs": variables}
        got = message(server.chat(body))
        assert (got["reasoning"], got["content"]) == ("so", "{}")
        (params,) = server.bridge.prepared
        assert params.structured_outputs is not None
        assert params.structured_outputs.reasoning == expected

    def test_without_tokens_for_it_a_constrained_answer_is_all_content(
        self, make_server: MakeServer
    ) -> None:
        server = make_server(reasoning_parser="qwq")
        server.bridge.script = lambda *_: "{}"
        got = message(server.chat({"response_format": {"type": "json_object"}}))
        assert got["content"] == "{}" and server.bridge.prepared[0].structured_outputs is not None
        assert server.bridge.prepared[0].structured_outputs.reasoning is None


class TestTools:
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_call_of_the_model_s_own(self, make_server: MakeServer, stream: bool) -> None:
        server = make_server(tool_parser="hermes")
        server.bridge.script = lambda *_: CALL
        answer = server.chat({"tools": [TOOL], "stream": stream})
        assert "TOOLS" in prompt_of(server)
        if stream:
            got = joined(answer)
            assert got["calls"][0] == {"name": "add", "arguments": '{"a": 1}'}
            assert got["finish"] == "tool_calls"
            return
        (call,) = message(answer)["tool_calls"]
        assert call["type"] == "function" and call["id"].startswith("call_")
        assert call["function"] == {"name": "add", "arguments": '{"a": 1}'}
        assert message(answer)["content"] is None
        assert answer.json["choices"][0]["finish_reason"] == "tool_calls"

    def test_without_a_parser_auto_is_refused(self, server: Server) -> None:
        assert server.chat({"tools": [TOOL]}).error["param"] == "tools"

    def test_none_hides_the_tools(self, server: Server) -> None:
        server.bridge.script = lambda *_: CALL
        answer = server.chat({"tools": [TOOL], "tool_choice": "none"})
        assert message(answer)["content"] == CALL and "TOOLS" not in prompt_of(server)

    def test_one_call_at_a_time(self, make_server: MakeServer) -> None:
        server = make_server(tool_parser="hermes")
        server.bridge.script = lambda *_: CALL + CALL
        assert len(message(server.chat({"tools": [TOOL]}))["tool_calls"]) == 2
        answer = server.chat({"tools": [TOOL], "parallel_tool_calls": False})
        assert len(message(answer)["tool_calls"]) == 1

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"tool_choice": "required"}, "tool_choice"),
            ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
            (
                {"tools": [TOOL], "tool_choice": {"function": {"name": "sub"}}},
                "tool_choice.function.name",
            ),
            ({"tools": [{"type": "custom", "function": {"name": "a"}}]}, "tools[0].type"),
            ({"tools": [{"function": {}}]}, "tools[0].function.name"),
        ],
    )
    def test_bad_tools(self, server: Server, body: dict[str, Any], param: str) -> None:
        answer = server.chat(body)
        assert answer.status == 400 and answer.error["param"] == param


class TestRendering:
    def test_text_parts_are_joined(self, server: Server) -> None:
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        server.chat({"messages": [user(parts)]})
        assert "user\na\nb" in prompt_of(server)

    @pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "refusal", None])
    def test_other_parts_are_named(self, server: Server, kind: str | None) -> None:
        part = {"type": kind, "image_url": {"url": "data:"}}
        answer = server.chat({"messages": [user("a"), user([part])]})
        assert answer.status == 400
        assert answer.error["param"] == "messages[1].content[0].type"
        assert str(kind) in answer.error["message"]

    def test_earlier_calls_reach_the_template_as_objects(self, server: Server) -> None:
        call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
        messages = [
            user("a"),
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "why"},
            {"role": "tool", "content": "2", "tool_call_id": "c1"},
        ]
        server.chat({"messages": messages})
        assert '<tool_call>f{"x": 1}' in prompt_of(server) and "(why)" in prompt_of(server)
        assert "tool\n2" in prompt_of(server)

    @pytest.mark.parametrize("arguments", ["{", "[1]", '"a"'])
    def test_arguments_must_be_an_object(self, server: Server, arguments: str) -> None:
        call = {"id": "c", "function": {"name": "f", "arguments": arguments}}
        message = {"role": "assistant", "tool_calls": [call]}
        answer = server.chat({"messages": [message]})
        assert answer.status == 400
        assert answer.error["param"] == "messages[0].tool_calls[0].function.arguments"

    def test_developer_is_system_to_older_templates(self, server: Server) -> None:
        server.chat({"messages": [{"role": "developer", "content": "be brief"}]})
        assert "system\nbe brief" in prompt_of(server)

    def test_unknown_role(self, server: Server) -> None:
        answer = server.chat({"messages": [{"role": "wizard", "content": "a"}]})
        assert answer.status == 400 and answer.error["param"] == "messages[0].role"
        assert "none of assistant, developer, system" in answer.error["message"]

    def test_continue_final_message(self, server: Server) -> None:
        messages = [user("a"), {"role": "assistant", "content": "I th"}]
        server.chat({"messages": messages, "continue_final_message": True})
        assert prompt_of(server).endswith("assistant\nI th")
        both = {"continue_final_message": True, "add_generation_prompt": True}
        answer = server.chat({"messages": messages, **both})
        assert answer.error["param"] == "continue_final_message"

    def test_no_messages(self, server: Server) -> None:
        assert server.chat({"messages": []}).error["param"] == "messages"

    def test_a_client_s_template_needs_permission(self, make_server: MakeServer) -> None:
        from sinterlm.options import ServeOptions

        body = {"chat_template": "{{ messages[0].content }}!"}
        assert make_server().chat(body).error["param"] == "chat_template"
        trusting = make_server(options=ServeOptions(trust_request_chat_template=True))
        assert trusting.chat(body).status == 200 and prompt_of(trusting) == "hi!"

    def test_a_template_that_refuses(self, make_server: MakeServer) -> None:
        server = make_server(chat_template="{{ raise_exception('no such order') }}")
        answer = server.chat()
        assert answer.status == 400 and "no such order" in answer.error["message"]

    def test_a_conversation_longer_than_the_context(self, server: Server) -> None:
        answer = server.chat({"messages": [user("x" * 600)]})
        assert answer.status == 400 and answer.error["code"] == "context_length_exceeded"
        assert answer.error["param"] == "messages"
        answer = server.chat({"max_tokens": 510})
        assert answer.error["param"] == "max_tokens"

    def test_long_bodies_are_rendered_on_another_thread(self, make_server: MakeServer) -> None:
        server = make_server(max_model_len=100_000)
        assert server.chat({"messages": [user("x" * 20_000)]}).status == 200
        assert server.post("/v1/chat/completions", chat_body(user="u")).status == 200
