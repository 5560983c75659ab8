"""serve(): one model behind HTTP, from a loaded LLM to the exit code of the process.

The first SIGTERM or SIGINT drains: requests under way are finished, new ones get a 503. The second
one aborts. An engine that died is reported to its clients, then the process exits for its
supervisor.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp

from sinterlm.engine.llm import LLM
from sinterlm.errors import UsageError
from sinterlm.options import EngineOptions, ServeOptions
from sinterlm.serve.app import build_app
from sinterlm.serve.bridge import Bridge
from sinterlm.serve.http_server import Listener, http_server
from sinterlm.serve.journal import Journal
from sinterlm.serve.listening import listen
from sinterlm.serve.metrics import Metrics
from sinterlm.serve.middleware import PUBLIC_PATHS, BodyLimit, Keys
from sinterlm.serve.parsers import TOOL_PARSERS, choose_reasoning_parser, choose_tool_parser
from sinterlm.serve.request_ids import RequestIds
from sinterlm.serve.served import ServedModel, served_model

logger = logging.getLogger(__name__)

#: Exit codes beside 0: the engine died; a second signal, as a shell counts it.
EXIT_ENGINE_DEAD = 70
_EXIT_SIGNAL = 128

#: Seconds that answers about a dead engine, or an abort, get to leave.
_LAST_WORDS = 2.0
#: Of the time to shut down, for the engine to finish; the rest is for its last tokens to leave.
_ENGINE_SHARE = 0.9
_MOST_FILES = 65536
#: Asked of the probe of --measure-roof; filling its buffer takes longer.
_PROBE_SECONDS = 0.5


@dataclass(frozen=True)
class Service:
    """What to serve, and how."""

    root: str  #: MODEL as it was given
    engine: EngineOptions
    options: ServeOptions
    chat_template: str | None  #: text of the option's file


def serve(llm: LLM, service: Service, listener: Listener, announce: Callable[[], None]) -> int:
    """Serve until told to stop; the exit code. ``announce`` is called once requests are taken.

    Raises UsageError, before anything is served, for options that do not fit the model.
    """
    info = describe(llm, service)
    _raise_file_limit()
    listen(listener.sockets)
    # What was allocated so far lives as long as the process: no collection needs to look at it.
    gc.collect()
    gc.freeze()
    return asyncio.run(_Run(llm, info, service, listener).run(announce))


def describe(llm: LLM, service: Service) -> ServedModel:
    """The model as clients see it. Raises UsageError for parsers that do not fit its template."""
    options = service.options
    template = service.chat_template or llm.tokenizer.assets.chat_template
    tool_parser = choose_tool_parser(options.tool_call_parser, template)
    if options.enable_auto_tool_choice and tool_parser is None:
        raise UsageError(
            "enable_auto_tool_choice needs a parser, and the chat template of this model shows "
            f"none; name one with tool_call_parser: {', '.join(TOOL_PARSERS)}"
        )
    return served_model(
        llm,
        names=options.served_model_name or (service.root,),
        root=service.root,
        chat_template=service.chat_template,
        tool_parser=tool_parser,
        reasoning_parser=choose_reasoning_parser(options.reasoning_parser, template),
    )


def layered(app: Starlette, service: Service, metrics: Metrics) -> ASGIApp:
    """``app`` behind keys and limits, the outermost layer last."""
    options = service.options
    paths = [route.path for route in app.routes if isinstance(route, Route)]
    layers: ASGIApp = BodyLimit(app, max_bytes=options.max_body_bytes)
    layers = Keys(
        layers,
        keys=options.api_key,
        public=PUBLIC_PATHS + ("/metrics",) * options.allow_unauthenticated_metrics,
        is_page_public=options.allow_unauthenticated_page,
    )
    if options.allowed_origins:
        layers = CORSMiddleware(
            layers,
            allow_origins=options.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    layers = Journal(layers, metrics=metrics, routes=paths, access_log=options.access_log)
    return RequestIds(layers)


class _Run:
    """One server from its start to its end, on one event loop."""

    def __init__(self, llm: LLM, info: ServedModel, service: Service, listener: Listener) -> None:
        self._options = service.options
        self._bridge = Bridge(
            llm,
            max_waiting=service.options.max_waiting,
            stream_interval=service.options.stream_interval,
        )
        metrics = Metrics(
            info.name, info.max_model_len, self._bridge.stats, _cache_labels(llm, service.engine)
        )
        app = build_app(self._bridge, info, service.options, metrics)
        self._server = http_server(layered(app, service, metrics), service.options, listener)
        self._signals: asyncio.Queue[signal.Signals] = asyncio.Queue()

    async def run(self, announce: Callable[[], None]) -> int:
        """Start, serve, drain; the exit code."""
        loop = asyncio.get_running_loop()
        for one in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(one, self._signals.put_nowait, one)
        await self._bridge.start()
        if self._options.measure_roof:
            await self._bridge.measure_roof(_PROBE_SECONDS)
        serving = asyncio.create_task(self._server.run())
        while not self._server.started:
            await asyncio.sleep(0.005)
        announce()
        code = await self._until_the_end()
        await serving
        return code

    async def _until_the_end(self) -> int:
        death = asyncio.create_task(self._engine_death())
        first = asyncio.create_task(self._signals.get())
        await asyncio.wait((death, first), return_when=asyncio.FIRST_COMPLETED)
        if not first.done():
            return await self._end_dead()
        logger.info("draining", extra={"fields": {"signal": first.result().name}})
        draining = asyncio.create_task(self._drain())
        second = asyncio.create_task(self._signals.get())
        await asyncio.wait((death, second, draining), return_when=asyncio.FIRST_COMPLETED)
        if death.done():
            return await self._end_dead()
        if second.done():
            return await self._abort(second.result())
        draining.result()
        logger.info("stopped")
        return 0

    async def _engine_death(self) -> None:
        while self._bridge.failure is None:
            await asyncio.sleep(0.1)

    async def _drain(self) -> None:
        """Finish what was admitted, still answering, with a 503, what comes new."""
        allowed = self._options.shutdown_timeout
        deadline = time.monotonic() + allowed
        await self._bridge.stop(allowed * _ENGINE_SHARE)
        await self._server.close(deadline - time.monotonic())

    async def _end_dead(self) -> int:
        """Let the clients read what happened, with health red, then give up."""
        logger.critical("the engine died", extra={"fields": {"failure": self._bridge.failure}})
        await asyncio.sleep(_LAST_WORDS)
        await self._server.close(_LAST_WORDS)
        return EXIT_ENGINE_DEAD

    async def _abort(self, received: signal.Signals) -> int:
        """End now, finished or not."""
        code = _EXIT_SIGNAL + received
        logger.warning("aborting", extra={"fields": {"signal": received.name}})
        try:
            await asyncio.wait_for(self._bridge.stop(0), _LAST_WORDS)
        except asyncio.TimeoutError:
            # The engine is inside a native step, and its memory must not go before it does.
            logging.shutdown()
            os._exit(code)
        await self._server.close(0)
        return code


def _cache_labels(llm: LLM, engine: EngineOptions) -> dict[str, str]:
    """What ``vllm:cache_config_info`` tells, under vLLM's words."""
    return {
        "block_size": str(engine.block_size),
        "num_gpu_blocks": str(llm.plan.num_pages),
        "cache_dtype": llm.bundle.manifest.kv_cache_dtype,
        "enable_prefix_caching": str(engine.enable_prefix_caching),
    }


def _raise_file_limit() -> None:
    """As many open connections as the system allows without privileges."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or soft < hard:
        wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
        if soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
