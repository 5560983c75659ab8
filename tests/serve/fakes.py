"""A scripted engine behind the bridge's seam, and an ASGI client that sees every byte.

The text of an answer comes from the test; stop strings, lengths and log-probabilities are applied
to it as the engine would, by the engine's own TextStream.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from sinterlm.engine.outputs import (
    CompletionOutput,
    Delta,
    Logprob,
    PromptLogprobs,
    RequestMetrics,
    RequestOutput,
    TokenLogprobs,
)
from sinterlm.engine.sampling import SamplingParams
from sinterlm.engine.stats import EngineStats
from sinterlm.engine.text_stream import TextStream
from sinterlm.engine.tokenizer import Tokenizer
from sinterlm.serve.bridge import Submission
from sinterlm.serve.stream import AbortReason

Script = Callable[[Submission, int], str]


@dataclass
class FakeStream:
    """Replays a script; ``hold`` stops it before the token of that number until released."""

    bridge: FakeBridge
    submission: Submission
    abort_reason: AbortReason | None = None
    cancelled: bool = False
    released: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def request_id(self) -> str:
        return self.submission.request_id

    def cancel(self) -> None:
        self.end("cancel")

    def end(self, reason: AbortReason) -> None:
        """End early, as the engine does for a deadline or a shutdown."""
        self.cancelled |= reason == "cancel"
        self.abort_reason = self.abort_reason or reason
        self.released.set()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        deltas = list(self.bridge.deltas(self.submission))
        for i, delta in enumerate(deltas):
            if i == self.bridge.hold:
                await self.released.wait()
            await asyncio.sleep(0)
            if self.bridge.error is not None and i == self.bridge.error_at:
                raise self.bridge.error
            if self.abort_reason is not None and i >= (self.bridge.hold or 0):
                yield Delta(self.request_id, delta.index, "", (), None, "abort")
                return
            yield delta


@dataclass
class FakeBridge:
    """Stands in for ``serve.bridge.Bridge``."""

    tokenizer: Tokenizer
    script: Script = lambda submission, index: "hello world"
    hold: int | None = None
    refusal: Exception | None = None  #: raised by submit
    error: Exception | None = None  #: raised by a stream before its token ``error_at``
    error_at: int = 0
    cached: int = 0
    is_ready: bool = True
    failure: str | None = None
    submissions: list[Submission] = field(default_factory=list)
    streams: list[FakeStream] = field(default_factory=list)
    prepared: list[SamplingParams] = field(default_factory=list)
    idle_calls: int = 0
    backwards: bool = False  #: of several sequences the last one draws first

    async def prepare(self, params: SamplingParams) -> None:
        self.prepared.append(params)

    def submit(self, submission: Submission) -> FakeStream:
        if self.refusal is not None:
            raise self.refusal
        assert submission.request_id not in {s.request_id for s in self.submissions}
        self.submissions.append(submission)
        self.streams.append(FakeStream(self, submission))
        return self.streams[-1]

    async def run_idle(self, fn: Callable[[Any], Any]) -> Any:
        self.idle_calls += 1

    def stats(self) -> EngineStats:
        return EngineStats(*[0] * 12, requests_finished={}, steps=0, step_seconds_total=0.0)

    # -- the script ------------------------------------------------------------------------------

    def deltas(self, submission: Submission) -> Iterator[Delta]:
        """All deltas of one request, its sequences one token each in turn."""
        runs = [list(self._sequence(submission, i)) for i in range(submission.params.n)]
        turns = runs[::-1] if self.backwards else runs
        order = [
            (step, run) for step in range(max(map(len, runs))) for run in turns if step < len(run)
        ]
        for i, (step, run) in enumerate(order):
            output = self._output(submission, runs) if i + 1 == len(order) else None
            delta = replace(run[step], output=output)
            if delta.index == 0 and step == 0:
                delta = replace(delta, prompt_logprobs=self._prompt_logprobs(submission))
            yield delta

    def _sequence(self, submission: Submission, index: int) -> Iterator[Delta]:
        params = submission.params
        ids = self.tokenizer.encode(self.script(submission, index), add_special_tokens=False)
        eos = self.tokenizer.eos_token_ids[0]
        if not params.ignore_eos:
            ids = [*ids, eos]
        ids = (ids * 50)[: params.max_tokens or len(ids)] if params.ignore_eos else ids
        ids = ids[: params.max_tokens]
        decode = self.tokenizer.decode_function(skip_special_tokens=params.skip_special_tokens)
        text = TextStream(
            decode, [], params.stop_strings, include_stop=params.include_stop_str_in_output,
            eager=True,
        )  # fmt: skip
        for i, token in enumerate(ids):
            may_stop = i + 1 >= params.min_tokens
            stops = may_stop and (token in params.stop_ids or (token == eos and i + 1 == len(ids)))
            if not stops or params.include_stop_str_in_output:
                found = text.push(token, may_stop=may_stop)
            reason = "stop" if stops or found else "length" if i + 1 == len(ids) else None
            if reason:
                text.finish()
            entry = self._logprobs(token, params.logprobs)
            stop_reason = found or (token if stops and token != eos else None)
            yield Delta(
                submission.request_id, index, text.take_delta(), (token,), entry,
                reason if reason else None, stop_reason,
            )  # type: ignore[arg-type]  # fmt: skip
            if reason:
                return

    def _logprobs(self, token: int, count: int | None) -> TokenLogprobs | None:
        if count is None:
            return None
        text = self.tokenizer.token_text
        entries = {token: Logprob(-0.5, 1, text(token))}
        for rank in range(2, count + 1):
            entries[rank] = Logprob(-0.5 * rank, rank, text(rank))
        return entries

    def _prompt_logprobs(self, submission: Submission) -> PromptLogprobs | None:
        count = submission.params.prompt_logprobs
        if count is None:
            return None
        ids = list(submission.prompt_token_ids)
        return [None, *(self._logprobs(token, count) for token in ids[1:])]

    def _output(self, submission: Submission, runs: list[list[Delta]]) -> RequestOutput:
        outputs = []
        for index, run in enumerate(runs):
            logprobs = [d.logprobs for d in run if d.logprobs is not None]
            outputs.append(
                CompletionOutput(
                    index=index,
                    text="".join(d.text for d in run),
                    token_ids=tuple(t for d in run for t in d.token_ids),
                    logprobs=logprobs or None,
                    cumulative_logprob=None,
                    finish_reason=run[-1].finish_reason or "length",
                    stop_reason=run[-1].stop_reason,
                )
            )
        now = time.perf_counter()
        return RequestOutput(
            request_id=submission.request_id,
            prompt=submission.prompt,
            prompt_token_ids=tuple(submission.prompt_token_ids),
            outputs=outputs,
            metrics=RequestMetrics(now, now, now, now),
            prompt_logprobs=self._prompt_logprobs(submission),
            num_cached_tokens=self.cached,
        )


# -- the client ----------------------------------------------------------------------------------


@dataclass
class Answer:
    """One HTTP answer."""

    status: int
    headers: dict[str, str]
    chunks: list[bytes]

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        assert set(self.json) == {"error"}
        assert set(self.json["error"]) == {"message", "type", "param", "code"}
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The data of every event but the last, which must be [DONE]."""
        assert self.headers["content-type"].startswith("text/event-stream")
        blocks = self.body.decode().split("\n\n")
        assert blocks[-1] == "" and blocks[-2] == "data: [DONE]"
        assert all(block.startswith("data: ") for block in blocks[:-1])
        return [json.loads(block[6:]) for block in blocks[:-2]]


class Client:
    """Calls an ASGI app; ``leave`` is when the client goes away."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        headers: dict[str, str] | None = None,
        leave: asyncio.Event | None = None,
    ) -> Answer:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"content-type": "application/json", **(headers or {})}
        path, _, query = path.partition("?")
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1", "method": method, "scheme": "http", "path": path,
            "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
            "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in sent.items()],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000), "state": {},
        }  # fmt: skip
        answer = Answer(0, {}, [])
        unread = [{"type": "http.request", "body": content, "more_body": False}]

        async def receive() -> Any:
            if unread:
                return unread.pop()
            await (leave or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                assert answer.status == 0
                answer.status = message["status"]
                answer.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            else:
                answer.chunks.append(message["body"])

        await self.app(scope, receive, send)
        return answer

    async def post(self, path: str, body: object = None, **more: Any) -> Answer:
        return await self.request("POST", path, body, **more)

    async def get(self, path: str, **more: Any) -> Answer:
        return await self.request("GET", path, b"", **more)
