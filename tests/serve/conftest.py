"""A served model on a scripted engine, and a client of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sinterlm.engine.sampling import SamplingParams
from sinterlm.engine.tokenizer import Tokenizer
from sinterlm.options import ServeOptions
from sinterlm.serve.app import build_app
from sinterlm.serve.metrics import Metrics
from sinterlm.serve.served import ServedModel
from tests.engine.texts import chat_assets, vocab_size
from tests.serve.fakes import Answer, Client, FakeBridge

#: A template that shows everything a request can bring into it.
TEMPLATE = """\
{%- if tools %}{{ 'TOOLS ' + (tools | tojson) + '\\n' }}{% endif %}
{%- if documents %}{{ 'DOCS ' + (documents | tojson) + '\\n' }}{% endif %}
{%- if reasoning_effort %}{{ 'EFFORT ' + reasoning_effort + '\\n' }}{% endif %}
{%- if enable_thinking is defined %}{{ 'THINK ' + (enable_thinking | string) + '\\n' }}{% endif %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' + (m.content or '') }}
    {%- if m.reasoning_content %}{{ '(' + m.reasoning_content + ')' }}{% endif %}
    {%- for call in m.tool_calls or [] %}
        {{- '<tool_call>' + call.function.name + (call.function.arguments | tojson) }}
    {%- endfor %}
    {{- eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
{%- if open_thinking %}{{ '<think>\\n' }}{% endif %}"""


class Server:
    """An app on its scripted bridge. Each call runs an event loop of its own."""

    def __init__(self, served: ServedModel, options: ServeOptions) -> None:
        self.served = served
        self.bridge = FakeBridge(served.tokenizer)
        self.metrics = Metrics("m", 128, self.bridge.stats, {})
        self.app = build_app(self.bridge, served, options, self.metrics)  # type: ignore[arg-type]
        self.client = Client(self.app)

    def post(self, path: str, body: object = None, **more: Any) -> Answer:
        return asyncio.run(self.client.post(path, body, **more))

    def get(self, path: str, **more: Any) -> Answer:
        return asyncio.run(self.client.get(path, **more))

    def chat(self, body: dict[str, Any] | None = None, **more: Any) -> Answer:
        return self.post("/v1/chat/completions", chat_body(**(body or {})), **more)

    def complete(self, body: dict[str, Any] | None = None, **more: Any) -> Answer:
        return self.post("/v1/completions", {"prompt": "hello", **(body or {})}, **more)


def chat_body(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"}], **more}


MakeServer = Callable[..., Server]


@pytest.fixture
def make_server() -> MakeServer:
    """``make_server(tool_parser="hermes", …)``: fields of ServedModel, then of ServeOptions."""

    def make(*, options: ServeOptions | None = None, **served: Any) -> Server:
        tokenizer = Tokenizer(chat_assets(chat_template=TEMPLATE))
        model = ServedModel(
            names=("tiny", "alias"),
            root="org/tiny",
            created=1_700_000_000,
            max_model_len=512,
            vocab_size=vocab_size(),
            tokenizer=tokenizer,
            defaults=SamplingParams(),
            default_max_tokens=None,
        )
        return Server(replace(model, **served), options or ServeOptions())

    return make


@pytest.fixture
def server(make_server: MakeServer) -> Server:
    return make_server()
