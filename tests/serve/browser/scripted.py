"""A server whose model says what the question tells it to: the real page, scripted answers.

What a question means is a word in it: ``think``, ``slow``, ``busy``, ``broken``, ``hostile``.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sinterlm.engine.stats import EngineStats
from sinterlm.options import ServeOptions
from sinterlm.serve.bridge import Bridge
from sinterlm.serve.context import Context
from sinterlm.serve.metrics import Metrics
from sinterlm.serve.served import ServedModel
from sinterlm.serve.web import page_routes
from tests.serve.test_page import STATS

MARKDOWN = """Gravity pulls things with **mass** together:

1. Mass bends *spacetime*.
2. Things follow, at `g = 9.81`; see [a page](https://example.org/g).
   - nested

```python
fall = 2 * 3
```

| body | g |
|---|---|
| Moon | 1.62 |
"""
HOSTILE = (
    "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'> "
    "[click](javascript:window.pwned=1) **<svg onload=window.pwned=1>** `<b>` "
    '[x](https://e.org/"onmouseover=window.pwned=1) <a href=javascript:window.pwned=1>y</a>\n\n'
    "| <img src=x onerror=window.pwned=1> |\n|---|\n| <script>window.pwned=1</script> |\n\n"
    "```<script>\n</code></pre><script>window.pwned = 1</script>\n```\n"
)


@dataclass
class Scripted:
    """What the browser sent, and what the engine claims; read and set by tests."""

    port: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)  #: "done" or "dropped", per stream
    stats: EngineStats = STATS
    polls: int = 0
    key: str | None = None
    is_ready: bool = True
    failure: str | None = None

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://127.0.0.1:{self.port}/"

    def answer_of(self, question: str) -> str:
        """The text a question is answered with."""
        if "hostile" in question:
            return HOSTILE
        if "markdown" in question:
            return MARKDOWN
        return "The capital of France is Paris. " * (40 if "slow" in question else 1)


def application(script: Scripted) -> Starlette:
    """The page's routes over scripted ones."""
    metrics = Metrics("tiny", 512, lambda: script.stats, {})
    served = ServedModel(
        names=("tiny",), root="tiny", created=0, max_model_len=512, vocab_size=8,
        tokenizer=cast("Any", None), defaults=cast("Any", None), default_max_tokens=None,
    )  # fmt: skip

    class Engine:
        @property
        def is_ready(self) -> bool:
            return script.is_ready

        @property
        def failure(self) -> str | None:
            return script.failure

        def stats(self) -> EngineStats:
            script.polls += 1
            if script.stats.num_running:  # it works: every poll finds more done
                metrics.first_token(0.08)
                metrics.token(0.03)
                made = script.stats.generation_tokens_total + 50
                script.stats = replace(script.stats, generation_tokens_total=made)
            return script.stats

    def refused(request: Request) -> Response | None:
        if script.key is None or request.headers.get("authorization") == f"Bearer {script.key}":
            return None
        error = {"message": "the API key is missing or wrong", "param": None, "code": None}
        return JSONResponse({"error": error}, 401)

    async def models(request: Request) -> Response:
        return refused(request) or JSONResponse({"data": [{"id": "tiny"}]})

    async def chat(request: Request) -> Response:
        if (refusal := refused(request)) is not None:
            return refusal
        body = await request.json()
        script.bodies.append(body)
        question = body["messages"][-1]["content"]
        if "busy" in question:
            error = {"message": "512 requests wait already", "param": None, "code": None}
            return JSONResponse({"error": error}, 429, headers={"retry-after": "7"})
        if "wrong" in question:
            error = {"message": "temperature=9 is above 2", "param": "temperature", "code": None}
            return JSONResponse({"error": error}, 400)
        return StreamingResponse(stream(question), media_type="text/event-stream")

    async def stream(question: str) -> AsyncIterator[str]:
        pause = 0.05 if "slow" in question else 0.002
        tokens = 0
        try:
            if "think" in question:
                for word in ("I ", "wonder ", "**why**. "):
                    yield event({"reasoning": word})
                    tokens += 1
                    await asyncio.sleep(0.15)
            text = script.answer_of(question)
            for at in range(0, len(text), 5):
                yield event({"content": text[at : at + 5]})
                tokens += 1
                await asyncio.sleep(pause)
                if "broken" in question and at > 10:
                    yield 'data: {"error": {"message": "the engine died (id 7f)", "code": 500}}\n\n'
                    return
            yield event({}, "length" if "cut" in question else "stop")
            usage = {"prompt_tokens": 9, "completion_tokens": tokens}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"
            script.ended.append("done")
        except (asyncio.CancelledError, GeneratorExit):
            script.ended.append("dropped")
            raise

    async def locked_stats(request: Request) -> Response:
        return refused(request) or await stats_route.endpoint(request)

    context = Context(
        cast(Bridge, Engine()), served, ServeOptions(), metrics, itertools.count()
    )  # fmt: skip
    routes = page_routes(context)
    stats_route = next(route for route in routes if route.path == "/ui/stats")
    return Starlette(
        routes=[
            Route("/ui/stats", locked_stats),
            *routes,
            Route("/v1/models", models),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ]
    )


def event(delta: dict[str, str], reason: str | None = None) -> str:
    """One event of a streamed chat completion."""
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


@contextmanager
def serving(script: Scripted) -> Iterator[Scripted]:
    """``script`` behind a port of its own, in a thread."""
    config = uvicorn.Config(application(script), port=0, lifespan="off", log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < deadline, "the scripted server does not start"
        time.sleep(0.01)
    script.port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield script
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
