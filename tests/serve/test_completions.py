"""Text completions: prompts of every kind, echo, log-probabilities, streams; and tokenize."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.conftest import MakeServer, Server


def texts(answer: Any) -> list[str]:
    assert answer.status == 200, answer.body
    return [choice["text"] for choice in answer.json["choices"]]


class TestPrompts:
    def test_a_text(self, server: Server) -> None:
        answer = server.complete().json
        assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
        assert answer["choices"] == [
            {
                "index": 0,
                "text": "hello world",
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ]

    @pytest.mark.parametrize(
        ("prompt", "count"),
        [("ab", 1), (["ab", "c"], 2), ([97, 98], 1), ([[97], [98, 99]], 2)],
    )
    def test_four_kinds(self, server: Server, prompt: Any, count: int) -> None:
        answer = server.complete({"prompt": prompt, "n": 2})
        assert len(server.bridge.submissions) == count
        assert [c["index"] for c in answer.json["choices"]] == list(range(2 * count))
        sent = sum(len(s.prompt_token_ids) for s in server.bridge.submissions)
        assert answer.json["usage"]["prompt_tokens"] == sent
        assert answer.json["usage"]["completion_tokens"] == 14 * count

    def test_answers_follow_their_prompts(self, server: Server) -> None:
        server.bridge.script = lambda submission, index: f"{submission.prompt}{index}"
        assert texts(server.complete({"prompt": ["a", "b"], "n": 2})) == ["a0", "a1", "b0", "b1"]

    @pytest.mark.parametrize(
        ("prompt", "param"),
        [
            ("", "prompt"), ([], "prompt"), ([[]], "prompt[0]"), (["a", ""], "prompt[1]"),
            ([1, "a"], "prompt"), ([[1], 2], "prompt"), ([-1], "prompt"), ([[1], [10**6]],
            "prompt[1]"), ([1.5], "prompt[0]"), ([True], "prompt[0]"), ({}, "prompt"),
            (None, "prompt"), (["a"] * 600, "prompt"), ("x" * 600, "prompt"),
        ],
    )  # fmt: skip
    def test_bad_ones_are_named(self, server: Server, prompt: Any, param: str) -> None:
        answer = server.complete({"prompt": prompt})
        assert answer.status == 400 and answer.error["param"] == param
        assert not server.bridge.submissions

    def test_sixteen_tokens_unless_told_otherwise(self, server: Server) -> None:
        server.complete()
        assert server.bridge.submissions[0].params.max_tokens == 16
        assert server.complete({"max_tokens": 3}).json["choices"][0]["finish_reason"] == "length"

    def test_truncation(self, server: Server) -> None:
        for more, kept in (
            ({"truncate_prompt_tokens": 2}, [3, 4]),
            ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, [1, 2]),
            ({"truncate_prompt_tokens": 9}, [1, 2, 3, 4]),
        ):
            server.complete({"prompt": [1, 2, 3, 4], **more})
            assert list(server.bridge.submissions[-1].prompt_token_ids) == kept
        server.complete({"prompt": [1] * 600, "truncate_prompt_tokens": -1})
        assert len(server.bridge.submissions[-1].prompt_token_ids) == 512 - 16


class TestEcho:
    def test_prompt_and_answer(self, server: Server) -> None:
        assert texts(server.complete({"echo": True})) == ["hellohello world"]
        assert texts(server.complete({"echo": True, "prompt": [97]}))[0].endswith("hello world")

    def test_the_prompt_alone(self, server: Server) -> None:
        answer = server.complete({"echo": True, "max_tokens": 0})
        assert texts(answer) == ["hello"]
        assert answer.json["usage"]["completion_tokens"] == 0
        assert server.complete({"max_tokens": 0}).error["param"] == "max_tokens"

    def test_in_a_stream_it_comes_with_the_first_token(self, server: Server) -> None:
        events = server.complete({"echo": True, "stream": True}).events
        assert events[0]["choices"][0]["text"] == "hellohello" and len(events) == 7

    @pytest.mark.parametrize("more", [{}, {"max_tokens": 0}, {"prompt": ["hello w", "world"]}])
    @pytest.mark.parametrize("backwards", [False, True])
    def test_a_stream_has_the_logprobs_of_the_whole_answer(
        self, server: Server, more: dict[str, Any], backwards: bool
    ) -> None:
        asked = {"prompt": "hello w", "echo": True, "logprobs": 2, "n": 2, **more}
        whole = server.complete(asked).json["choices"]
        server.bridge.backwards = backwards
        got = [{"text": "", "logprobs": {}} for _ in whole]
        for event in server.complete({**asked, "stream": True}).events:
            (choice,) = event["choices"]
            one = got[choice["index"]]
            one["text"] += choice["text"]
            for name, values in choice["logprobs"].items():
                one["logprobs"].setdefault(name, []).extend(values)
        assert got == [{"text": c["text"], "logprobs": c["logprobs"]} for c in whole]
        assert got[0]["logprobs"]["token_logprobs"][0] is None


class TestStream:
    def test_each_event_is_one_token(self, server: Server) -> None:
        events = server.complete({"stream": True, "stream_options": {"include_usage": True}}).events
        assert len(events) == 8 and events[-1]["choices"] == []
        assert events[-1]["usage"]["completion_tokens"] == 7
        assert "".join(e["choices"][0]["text"] for e in events[:-1]) == "hello world"
        assert events[-2]["choices"][0]["finish_reason"] == "stop"

    def test_several_prompts(self, server: Server) -> None:
        server.bridge.script = lambda submission, _: f"{submission.prompt}!"
        events = server.complete({"prompt": ["a", "b"], "stream": True}).events
        got = ["", ""]
        for event in events:
            (choice,) = event["choices"]
            got[choice["index"]] += choice["text"]
        assert got == ["a!", "b!"]

    def test_logprobs_carry_offsets(self, server: Server) -> None:
        events = server.complete({"stream": True, "logprobs": 1}).events
        offsets = [e["choices"][0]["logprobs"]["text_offset"][0] for e in events]
        assert offsets == [0, 5, 7, 8, 9, 10, 11]


class TestTokens:
    def test_round_trip(self, server: Server) -> None:
        answer = server.post("/tokenize", {"prompt": "hello w"}).json
        assert answer["count"] == len(answer["tokens"]) and answer["max_model_len"] == 512
        text = server.post("/detokenize", {"tokens": answer["tokens"]}).json
        assert text == {"prompt": "hello w"}

    def test_token_strings(self, server: Server) -> None:
        answer = server.post("/tokenize", {"prompt": "hello w", "return_token_strs": True}).json
        assert answer["token_strs"] == ["hello", " w"]

    def test_a_conversation(self, server: Server) -> None:
        messages = [{"role": "user", "content": "hi"}]
        answer = server.post("/tokenize", {"messages": messages}).json
        server.chat({"messages": messages})
        assert answer["tokens"] == list(server.bridge.submissions[0].prompt_token_ids)

    @pytest.mark.parametrize(
        ("path", "body", "param"),
        [
            ("/tokenize", {}, "prompt"),
            ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
            ("/tokenize", {"prompt": "a", "tools": []}, "tools"),
            ("/tokenize", {"prompt": "a", "model": "b"}, "model"),
            ("/detokenize", {}, "tokens"),
            ("/detokenize", {"tokens": [10**9]}, "tokens"),
            ("/detokenize", {"tokens": [-1]}, "tokens"),
            ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ],
    )
    def test_bad_ones(self, server: Server, path: str, body: Any, param: str) -> None:
        answer = server.post(path, body)
        assert answer.status in (400, 404) and answer.error["param"] == param

    def test_empty_is_nothing(self, server: Server) -> None:
        assert server.post("/tokenize", {"prompt": ""}).json["count"] == 0
        assert server.post("/detokenize", {"tokens": []}).json == {"prompt": ""}

    def test_without_a_vocabulary(self, make_server: MakeServer) -> None:
        from sinterlm.artifact.text import TextAssets
        from sinterlm.engine.tokenizer import Tokenizer

        server = make_server(tokenizer=Tokenizer(TextAssets()))
        for path, body in (
            ("/tokenize", {"prompt": "a"}),
            ("/detokenize", {"tokens": [1]}),
            ("/v1/completions", {"prompt": "a"}),
        ):
            assert server.post(path, body).status == 400
