"""One request to an OpenAI-compatible server, streamed, with a stamp for every chunk.

A chunk counts when it has ``choices``; a final one without them brings the server's own counts.
Stricter than vLLM's client in one respect: an error object inside a stream, and a stream that
breaks off without ``finish_reason`` or ``[DONE]``, is a failure.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from sinterlm.bench.raw import RequestRecord
from sinterlm.bench.workload import Request
from sinterlm.errors import UsageError

if TYPE_CHECKING:
    import aiohttp

#: What one said before: pairs of question and answer.
History = Sequence[tuple[str, str]]

_TIMEOUT_S = 6 * 3600.0
_ERROR_CHARS = 400  #: of a server's own words that are kept


@dataclass(frozen=True)
class Target:
    """Where requests go and what each of them says beside its prompt."""

    base_url: str  #: e.g. http://127.0.0.1:8000
    model: str
    backend: Literal["openai", "openai-chat"] = "openai"
    endpoint: str | None = None  #: None = the backend's usual path
    headers: Mapping[str, str] = field(default_factory=dict)
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    ignore_eos: bool = False
    logprobs: int | None = None
    send_token_ids: bool = False  #: prompts as token ids; completions only
    verify_tls: bool = True
    keep_alive: bool = True  #: False = a connection for each request

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise UsageError(f"{self.base_url!r} is no URL; write http://host:port")
        if self.send_token_ids and self.backend == "openai-chat":
            raise UsageError("chat requests carry text; token ids need --backend openai")

    @property
    def url(self) -> str:
        """Of the endpoint."""
        usual = "/v1/chat/completions" if self.backend == "openai-chat" else "/v1/completions"
        return self.base_url.rstrip("/") + (self.endpoint or usual)

    def body(self, request: Request, history: History) -> dict[str, Any]:
        """What is posted."""
        common = {"stream": True, "stream_options": {"include_usage": True}}
        if self.ignore_eos:
            common["ignore_eos"] = True
        if self.backend == "openai-chat":
            own = {
                "messages": _messages(request, history),
                "max_completion_tokens": request.output_len,
            }
        else:
            own = {
                "prompt": self._prompt(request, history),
                "repetition_penalty": 1.0,
                "max_tokens": request.output_len,
                "logprobs": self.logprobs,
            }
        return {"model": self.model, **own, **common, **self.extra_body}

    def _prompt(self, request: Request, history: History) -> str | list[int]:
        if self.send_token_ids and not history:
            if request.token_ids is None:
                raise UsageError("this dataset brings text, not token ids; drop --send-token-ids")
            return list(request.token_ids)
        return "".join(question + answer for question, answer in history) + request.prompt

    def request_headers(self, request_id: str) -> dict[str, str]:
        """With the key of the environment, as OpenAI's own clients take it."""
        headers = {"Content-Type": "application/json", "x-request-id": request_id}
        key = os.environ.get("OPENAI_API_KEY")
        if key:
            headers["Authorization"] = f"Bearer {key}"
        return {**headers, **self.headers}


def _messages(request: Request, history: History) -> list[dict[str, str]]:
    said = []
    for question, answer in history:
        said.append({"role": "user", "content": question})
        said.append({"role": "assistant", "content": answer})
    return [*said, {"role": "user", "content": request.prompt}]


def open_session(target: Target, max_concurrency: int | None) -> aiohttp.ClientSession:
    """A session that keeps connections if ``target`` does; to be closed by the caller. Raises
    UsageError without aiohttp."""
    http = import_http()
    limit = max_concurrency or 0
    kept = {"keepalive_timeout": 60} if target.keep_alive else {"force_close": True}
    connector = http.TCPConnector(limit=limit, limit_per_host=limit, ssl=target.verify_tls, **kept)
    timeout = http.ClientTimeout(total=_TIMEOUT_S)
    session: aiohttp.ClientSession = http.ClientSession(
        connector=connector, timeout=timeout, trust_env=True
    )
    return session


def import_http() -> Any:
    """aiohttp. Raises UsageError with the command that installs it."""
    try:
        import aiohttp
    except ImportError:
        raise UsageError(
            "this benchmark needs aiohttp; run: pip install 'sinterlm[bench]'"
        ) from None
    return aiohttp


async def send(
    session: aiohttp.ClientSession,
    target: Target,
    request: Request,
    index: int,
    zero: float,
    arrival: float,
    history: History = (),
) -> RequestRecord:
    """Post one request and read its stream to the end; ``zero`` and ``arrival`` are times of
    ``perf_counter``. Never raises for what a server does: the record says what went wrong."""
    stream = _Stream()
    status: int | None = None
    body = json.dumps(target.body(request, history)).encode()
    headers = target.request_headers(request.request_id)
    start = time.perf_counter()
    try:
        async with session.post(target.url, data=body, headers=headers) as response:
            status = response.status
            if status == 200:
                async for data in response.content.iter_any():
                    stream.push(data, time.perf_counter() - start)
                stream.end()
            else:
                said = (await response.text())[:_ERROR_CHARS]
                stream.error = f"HTTP {status} {response.reason or ''}: {said}"
    except Exception as exc:  # whatever breaks a connection is this request's failure
        stream.error = f"{type(exc).__name__}: {exc}"
    except BaseException:
        stream.error = "interrupted"
        raise
    finally:
        record = stream.record(request, index, arrival - zero, start - zero, status)
    return record


class _Stream:
    """Server-sent events as they arrive."""

    def __init__(self) -> None:
        self.error: str | None = None
        self._rest = b""
        self._events: list[float] = []
        self._texts: list[str] = []
        self._usage: dict[str, Any] = {}
        self._told: dict[str, Any] = {}  # usage wherever it stood
        self._finish_reason: str | None = None
        self._is_done = False

    def push(self, data: bytes, at: float) -> None:
        """Bytes that were read ``at`` seconds after the start."""
        for payload in self._payloads(data):
            if payload == b"[DONE]":
                self._is_done = True
                continue
            event = json.loads(payload)
            if not isinstance(event, dict):
                raise ValueError(f"a chunk that is no object: {payload[:80]!r}")
            self._take(event, at)

    def _payloads(self, data: bytes) -> Iterator[bytes]:
        """Contents of the ``data:`` lines that are whole now."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()

    def _take(self, event: dict[str, Any], at: float) -> None:
        if event.get("error"):
            self.error = self.error or f"error in the stream: {event['error']}"[:_ERROR_CHARS]
        choices, usage = event.get("choices"), event.get("usage")
        if isinstance(usage, dict) and usage:
            self._told = usage
        if choices:
            self._events.append(at)
            choice = choices[0]
            text = choice.get("text")
            if text is None:
                text = (choice.get("delta") or {}).get("content")
            self._texts.append(text or "")
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
        elif usage:  # beside choices it does not count, as in vLLM's client
            self._usage = usage

    def end(self) -> None:
        """The server closed the stream."""
        if self.error is not None:
            return
        if not self._events:
            self.error = "the stream held no chunk with choices"
        elif not self._is_done and self._finish_reason is None:
            self.error = "the stream broke off: neither finish_reason nor [DONE]"

    def record(
        self, request: Request, index: int, arrival: float, start: float, status: int | None
    ) -> RequestRecord:
        """What was seen."""
        return RequestRecord(
            index=index,
            request_id=request.request_id,
            prompt_len=_count(self._usage, "prompt_tokens") or request.prompt_len,
            asked_len=request.output_len,
            arrival_s=arrival,
            start_s=start,
            events_s=tuple(self._events),
            usage_tokens=_count(self._usage, "completion_tokens"),
            told_tokens=_count(self._told, "completion_tokens"),
            finish_reason=self._finish_reason,
            status=status,
            error=self.error,
            text="".join(self._texts),
        )


def _count(usage: Mapping[str, Any], name: str) -> int | None:
    value = usage.get(name)
    return value if type(value) is int and value >= 0 else None
