"""The page at ``/``: its files, served as they lie in ``serve/web``, and what its dashboard polls.

The files are read once and hold nothing about this server; everything the page shows it asks for.
Their policy forbids inline scripts, HTML from strings, and every other origin.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sinterlm import __version__
from sinterlm.engine.stats import EngineStats
from sinterlm.runtime.machine import cpu_name, read_machine
from sinterlm.serve.context import Context
from sinterlm.serve.errors import ApiError
from sinterlm.serve.metrics import HistogramSnapshot

_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Names stay the same across releases, so a browser asks each time; a 304 is quick.
    "cache-control": "no-cache",
}


class ModelFacts(msgspec.Struct, frozen=True):
    """The model as the dashboard names it."""

    name: str
    max_model_len: int  #: tokens


class MachineFacts(msgspec.Struct, frozen=True):
    """What this process may use of the machine."""

    cpu: str  #: as the processor calls itself
    cpus: int  #: threads that can run at once
    memory_bytes: int  #: the cgroup's limit, else the machine's


class Distribution(msgspec.Struct, frozen=True):
    """A histogram since the server's start, seconds."""

    bounds: tuple[float, ...]  #: upper bound of each bucket but the last one, which has none
    counts: tuple[int, ...]  #: one more than bounds; not cumulated
    total: float  #: sum of all observations


class PageStats(msgspec.Struct, frozen=True):
    """The answer of ``GET /ui/stats``: everything the dashboard draws, at one moment."""

    version: str
    ready: bool  #: false while draining and after a failure
    failure: str | None  #: what ended the engine thread
    uptime_seconds: float
    model: ModelFacts
    machine: MachineFacts
    engine: EngineStats
    ttft: Distribution
    itl: Distribution


@dataclass(frozen=True)
class Asset:
    """One file of the page, ready to be sent."""

    body: bytes
    headers: dict[str, str]

    def answer(self, request: Request) -> Response:
        """200 with the file, or 304 when the client has it already."""
        known = request.headers.get("if-none-match", "")
        tags = {tag.strip().removeprefix("W/") for tag in known.split(",")}
        if self.headers["etag"] in tags or "*" in tags:
            kept = {k: v for k, v in self.headers.items() if k != "content-type"}
            return Response(status_code=304, headers=kept)
        return Response(self.body, headers=self.headers)


class Page:
    """The handlers. One per application; uptime counts from here."""

    def __init__(self, context: Context) -> None:
        self._bridge = context.bridge
        self._metrics = context.metrics
        self._started = time.monotonic()
        self._assets = read_assets()
        self._model = ModelFacts(context.served.name, context.served.max_model_len)
        machine = read_machine()
        self._machine = MachineFacts(cpu_name(), machine.num_cpus, machine.memory_limit)

    async def index(self, request: Request) -> Response:
        """The page itself."""
        return self._assets["index.html"].answer(request)

    async def file(self, request: Request) -> Response:
        """One of its files, by a name that the package has; no path is ever opened."""
        asset = self._assets.get(request.path_params["file"])
        if asset is None:
            raise ApiError(
                404, "the page has no such file", kind="not_found_error", code="not_found"
            )
        return asset.answer(request)

    async def stats(self, request: Request) -> Response:
        """A snapshot for the dashboard; cheap enough for once a second and viewer."""
        stats = PageStats(
            version=__version__,
            ready=self._bridge.is_ready,
            failure=self._bridge.failure,
            uptime_seconds=time.monotonic() - self._started,
            model=self._model,
            machine=self._machine,
            engine=self._bridge.stats(),
            ttft=_distribution(self._metrics.ttft()),
            itl=_distribution(self._metrics.itl()),
        )
        return Response(
            msgspec.json.encode(stats),
            media_type="application/json",
            headers={"cache-control": "no-store"},
        )


def page_routes(context: Context) -> list[Route]:
    """``/``, ``/ui/stats`` and ``/ui/{file}``."""
    page = Page(context)
    return [
        Route("/", page.index, methods=["GET"]),
        Route("/ui/stats", page.stats, methods=["GET"]),
        Route("/ui/{file}", page.file, methods=["GET"]),
    ]


def read_assets() -> dict[str, Asset]:
    """Every file of ``serve/web`` by its name."""
    assets = {}
    for file in resources.files("sinterlm.serve").joinpath("web").iterdir():
        media_type = _MEDIA_TYPES.get(Path(file.name).suffix)
        if media_type is None:
            continue
        body = file.read_bytes()
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        assets[file.name] = Asset(body, {**_HEADERS, "content-type": media_type, "etag": tag})
    return assets


def _distribution(histogram: HistogramSnapshot) -> Distribution:
    return Distribution(histogram.bounds[:-1], histogram.counts, histogram.total)
