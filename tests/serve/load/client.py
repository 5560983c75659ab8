"""Streams over raw connections: cheap enough for hundreds at once, and able to be rude."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.serve.load.process import ServerProcess

QUESTIONS = (
    "What is the capital of France?", "Why is the sky blue?", "Name three colours.",
    "What do bees make?", "How many legs has a spider?", "Tell me about the Moon.",
    "What is bread made of?", "Who wrote Hamlet?", "What is a volcano?", "Count to ten.",
    "What is the largest ocean?", "Explain rain to a child.",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One request whose answer is known to be always the same."""

    body: dict[str, Any]

    def encoded(self) -> bytes:
        """The request's bytes; the connection closes with the answer."""
        body = json.dumps({**self.body, "stream": True, "return_token_ids": True}).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        return head.encode() + body


@dataclass
class Outcome:
    """How one stream went."""

    status: int = 0
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reason: str | None = None
    is_done: bool = False  #: ``[DONE]`` came
    error: str | None = None  #: of an error event, or a whole error answer


def cases(count: int, *, max_tokens: Sequence[int] = (6, 12, 18, 24)) -> list[Case]:
    """Requests that differ in question, length and sampling, each with a seed of its own."""
    made = []
    for i in range(count):
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}],
            "max_completion_tokens": max_tokens[i % len(max_tokens)],
            "seed": i,
            "temperature": 0.0 if i % 3 == 0 else 0.9,
        }
        if i % 4 == 1:
            body["messages"].insert(0, {"role": "system", "content": "Be brief. " * (4 * i)})
        made.append(Case(body))
    return made


async def stream(
    port: int,
    case: Case,
    *,
    drop_after_s: float | None = None,
    drop_after_tokens: int | None = None,
) -> Outcome:
    """Run one request to its end, or close the connection after a time or a number of tokens."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    outcome = Outcome()
    try:
        writer.write(case.encoded())
        reading = read(reader, outcome, most_tokens=drop_after_tokens)
        await (reading if drop_after_s is None else asyncio.wait_for(reading, drop_after_s))
    except asyncio.TimeoutError:
        pass
    finally:
        writer.close()
    return outcome


async def read(
    reader: asyncio.StreamReader,
    outcome: Outcome,
    *,
    pause_s: float = 0.0,
    most_tokens: int | None = None,
) -> None:
    """Read an answer into ``outcome``, or its first ``most_tokens``.

    ``pause_s`` before every line makes a slow reader.
    """
    outcome.status = int((await reader.readline()).split()[1])
    while await reader.readline() not in (b"\r\n", b""):
        pass
    while line := await reader.readline():
        await asyncio.sleep(pause_s)
        if outcome.status != 200 and line.startswith(b"{"):
            outcome.error = json.loads(line)["error"]["message"]
        if line.startswith(b"data: [DONE]"):
            outcome.is_done = True
        elif line.startswith(b"data: "):
            _take(json.loads(line[6:]), outcome)
            if most_tokens is not None and len(outcome.tokens) >= most_tokens:
                return


def _take(event: dict[str, Any], outcome: Outcome) -> None:
    if "error" in event:
        outcome.error = event["error"]["message"]
        return
    for choice in event["choices"]:
        outcome.text += choice["delta"].get("content") or ""
        outcome.tokens += choice.get("token_ids") or []
        outcome.reason = choice["finish_reason"] or outcome.reason


def alone(server: ServerProcess, known: Sequence[Case]) -> list[Outcome]:
    """What each case answers when nothing else runs."""

    async def one_by_one() -> list[Outcome]:
        return [await stream(server.port, case) for case in known]

    outcomes = asyncio.run(one_by_one())
    for outcome in outcomes:
        assert outcome.status == 200 and outcome.is_done and outcome.tokens, outcome
    return outcomes
