"""Drives a running server with OpenAI's Python client and LangChain's chat model, both unchanged.

    python scripts/check_clients.py http://127.0.0.1:8000/v1 MODEL [CHECK_TO_LEAVE_OUT...]

Needs openai and langchain-openai. Prints one line per check; the exit code is 1 if one fails.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from langchain_openai import ChatOpenAI
from openai import BadRequestError, NotFoundError, OpenAI

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}


class OpenAIChecks:
    """OpenAI's own client, version 1 and later."""

    def __init__(self, url: str, model: str) -> None:
        self.client = OpenAI(base_url=url, api_key="none")
        self.model = model
        self.fixed: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": 24}

    def models(self) -> None:
        """List and show."""
        assert self.model in [card.id for card in self.client.models.list()]
        assert self.client.models.retrieve(self.model).id == self.model

    def chat(self) -> None:
        """A whole answer and a stream of the same."""
        whole = self.client.chat.completions.create(messages=QUESTION, **self.fixed)
        parts, usage = [], None
        for event in self.client.chat.completions.create(
            messages=QUESTION, stream=True, stream_options={"include_usage": True}, **self.fixed
        ):
            parts += [choice.delta.content or "" for choice in event.choices]
            usage = event.usage or usage
        assert "".join(parts) == whole.choices[0].message.content
        assert usage == whole.usage

    def logprobs(self) -> None:
        """Typed log-probabilities."""
        answer = self.client.chat.completions.create(
            messages=QUESTION, logprobs=True, top_logprobs=3, **self.fixed
        )
        content = answer.choices[0].logprobs.content
        assert content and len(content[0].top_logprobs) == 3

    def completions(self) -> None:
        """Several prompts at once, each several times."""
        answer = self.client.completions.create(prompt=["One, two,", "A, B,"], n=2, **self.fixed)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]

    def schema(self) -> None:
        """An answer that follows a JSON schema."""
        form: Any = {"type": "json_schema", "json_schema": {"name": "c", "schema": SCHEMA}}
        answer = self.client.chat.completions.create(
            messages=QUESTION, response_format=form, **self.fixed
        )
        assert set(json.loads(answer.choices[0].message.content)) == {"city"}

    def tools(self) -> None:
        """A call that is asked for by name."""
        tool: Any = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}
        fixed = {**self.fixed, "max_tokens": 100}  # a call that is cut off is content
        answer = self.client.chat.completions.create(
            messages=QUESTION, tools=[tool], tool_choice="required",
            parallel_tool_calls=False, **fixed,
        )  # fmt: skip
        (call,) = answer.choices[0].message.tool_calls
        assert set(json.loads(call.function.arguments)) == {"city"}
        assert answer.choices[0].finish_reason == "tool_calls"

    def errors(self) -> None:
        """The client's own exceptions, with the field."""
        try:
            self.client.chat.completions.create(messages=QUESTION, model=self.model, top_p=7)
            raise AssertionError("top_p=7 was taken")
        except BadRequestError as exc:
            assert exc.param == "top_p"
        try:
            self.client.models.retrieve("nobody")
            raise AssertionError("there is no such model")
        except NotFoundError as exc:
            assert exc.code == "model_not_found"


class LangChainChecks:
    """LangChain's ChatOpenAI."""

    def __init__(self, url: str, model: str) -> None:
        self.model = ChatOpenAI(
            base_url=url, api_key="none", model=model, temperature=0, max_tokens=24
        )

    def invoke(self) -> None:
        """A whole answer and a stream of the same."""
        whole = self.model.invoke("What is the capital of France?")
        pieces = list(self.model.stream("What is the capital of France?"))
        assert "".join(piece.content for piece in pieces) == whole.content
        assert whole.usage_metadata["output_tokens"] > 0

    def batch(self) -> None:
        """Three at a time."""
        assert len(self.model.batch(["Say one.", "Say two.", "Say three."])) == 3

    def structured(self) -> None:
        """with_structured_output, which sends response_format."""
        schema = {"title": "place", **SCHEMA}
        asking = self.model.with_structured_output(schema, method="json_schema")
        assert set(asking.invoke("What is the capital of France?")) == {"city"}


def checks(url: str, model: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every check and its name."""
    for of in (OpenAIChecks(url, model), LangChainChecks(url, model)):
        for name in vars(type(of)):
            if not name.startswith("_"):
                yield f"{type(of).__name__}.{name}", getattr(of, name)


def main() -> int:
    """Run all; the exit code."""
    failed = 0
    for name, check in checks(*sys.argv[1:3]):
        if name.partition(".")[2] in sys.argv[3:]:
            continue
        try:
            check()
            print(f"ok      {name}")
        except Exception as exc:
            failed += 1
            print(f"FAILED  {name}: {type(exc).__name__}: {exc}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
