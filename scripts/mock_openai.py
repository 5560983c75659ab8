"""A stand-in for an OpenAI-compatible server: answers by a script, at the times it says.

    python scripts/mock_openai.py --port 8100 [--script plans.json]

A script is a list of plans; request ``bench-…-i`` follows plan i (modulo their number). It notes
when it sent each chunk, on the clock that every process of the machine shares: GET /sent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from aiohttp import web

Fault = Literal["http", "drop", "error", "garbage", "cut", "empty"]


@dataclass(frozen=True)
class Plan:
    """What one request gets."""

    delays_s: tuple[float, ...] = (0.01, 0.01, 0.01)  #: before each chunk
    tokens: tuple[int, ...] = ()  #: in each chunk; () = one each
    sends_usage: bool = True
    merges_usage: bool = False  #: in a last chunk of its own with empty text, as llama-server does
    #: After all chunks: "http" answers 503 instead of any, "drop" closes the connection without an
    #: end, "error" sends an error object, "garbage" no JSON, "cut" ends without finish_reason and
    #: [DONE]; "empty" ends without a chunk.
    fault: Fault | None = None

    @property
    def num_tokens(self) -> int:
        """In all chunks."""
        return sum(self.tokens) if self.tokens else len(self.delays_s)


@dataclass
class Server:
    """State of the stand-in."""

    plans: list[Plan] = field(default_factory=lambda: [Plan()])
    #: request id -> times of perf_counter: of arrival, and of each chunk
    sent: dict[str, list[float]] = field(default_factory=dict)
    bodies: dict[str, dict[str, Any]] = field(default_factory=dict)

    def app(self) -> web.Application:
        """Its routes."""
        app = web.Application()
        app.add_routes(
            [
                web.post("/v1/completions", self.complete),
                web.post("/v1/chat/completions", self.complete),
                web.get("/v1/models", self.models),
                web.get("/health", self.health),
                web.post("/reset_prefix_cache", self.health),
                web.post("/script", self.script),
                web.get("/sent", self.report),
            ]
        )
        return app

    async def models(self, _: web.Request) -> web.Response:
        """One model."""
        entry = {"id": "mock", "object": "model", "root": "mock", "max_model_len": 4096}
        return web.json_response({"object": "list", "data": [entry]})

    async def health(self, _: web.Request) -> web.Response:
        """Well."""
        return web.Response()

    async def script(self, request: web.Request) -> web.Response:
        """Replace the plans and forget what was sent."""
        self.plans = read_plans(await request.json())
        self.sent.clear()
        self.bodies.clear()
        return web.Response()

    async def report(self, _: web.Request) -> web.Response:
        """What was received, and when what was sent."""
        return web.json_response({"sent": self.sent, "bodies": self.bodies})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Follow the plan of this request."""
        arrival = time.perf_counter()
        body = await request.json()
        name = request.headers.get("x-request-id", "bench-0")
        index = int(name.rsplit("-", 1)[-1]) if name.rsplit("-", 1)[-1].isdigit() else 0
        plan = self.plans[index % len(self.plans)]
        self.bodies[name] = body
        stamps = self.sent[name] = [arrival]
        if plan.fault == "http":
            return web.Response(status=503, text="overloaded", reason="Service Unavailable")
        if not body.get("stream"):
            choice = {"index": 0, "text": " word" * plan.num_tokens, "finish_reason": "length"}
            return web.json_response({"id": "x", "model": "mock", "choices": [choice]})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        is_chat = request.path.endswith("chat/completions")
        if plan.fault != "empty":
            await self._stream(response, plan, is_chat, stamps)
        if plan.fault == "drop" and request.transport is not None:
            request.transport.abort()
            return response
        await response.write(_ending(plan, is_chat, body))
        await response.write_eof()
        return response

    async def _stream(
        self, response: web.StreamResponse, plan: Plan, is_chat: bool, stamps: list[float]
    ) -> None:
        due = stamps[0]
        for number, delay in enumerate(plan.delays_s):
            due += delay
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            count = plan.tokens[number] if plan.tokens else 1
            stamps.append(time.perf_counter())
            await response.write(_chunk(" word" * count, is_chat, None))


def _chunk(text: str, is_chat: bool, finish_reason: str | None) -> bytes:
    content = {"delta": {"content": text}} if is_chat else {"text": text}
    choice = {"index": 0, "finish_reason": finish_reason, **content}
    return _event({"id": "x", "object": "chunk", "model": "mock", "choices": [choice]})


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def _ending(plan: Plan, is_chat: bool, body: dict[str, Any]) -> bytes:
    if plan.fault == "error":
        return _event({"error": {"message": "the engine died", "code": 500}})
    if plan.fault == "garbage":
        return b"data: {not json\n\n"
    if plan.fault == "cut":
        return b": bye\n\n"
    usage = {"prompt_tokens": 7, "completion_tokens": plan.num_tokens, "total_tokens": 0}
    wanted = (body.get("stream_options") or {}).get("include_usage")
    choices = [{"index": 0, "finish_reason": "length", "text": ""}] if plan.merges_usage else []
    last = _event({"id": "x", "choices": choices, "usage": usage})
    return (last if plan.sends_usage and wanted else b"") + b"data: [DONE]\n\n"


def read_plans(data: list[dict[str, Any]]) -> list[Plan]:
    """Plans from JSON."""
    return [
        Plan(
            tuple(one["delays_s"]),
            tuple(one.get("tokens", ())),
            one.get("sends_usage", True),
            one.get("merges_usage", False),
            one.get("fault"),
        )
        for one in data
    ]


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--script", type=Path)
    # What engines take as well, so that the stand-in can be launched like one.
    args, _ = parser.parse_known_args()
    server = Server()
    if args.script:
        server.plans = read_plans(json.loads(args.script.read_text()))
    web.run_app(server.app(), host=args.host, port=args.port, print=None)


if __name__ == "__main__":
    main()
