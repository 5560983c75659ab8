"""Bridge: one asyncio front, one engine thread. Requests go in, deltas come out, in order.

The engine thread alone touches the engine. What one step drew reaches the event loop in a single
wake-up, however many streams it belongs to. Only monotonic clocks are read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import queue
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from sinterlm.engine.engine import Engine
from sinterlm.engine.llm import LLM
from sinterlm.engine.outputs import Delta, RequestOutput
from sinterlm.engine.roof_meter import RoofMeter
from sinterlm.engine.sampling import SamplingParams
from sinterlm.engine.stats import EngineStats, OpStats, op_stats
from sinterlm.errors import DrainingError, EngineDeadError, ResourceError, UsageError
from sinterlm.serve.pace import Pace
from sinterlm.serve.stream import AbortReason, Stream
from sinterlm.serve.waiting_room import WaitingRoom

T = TypeVar("T")

logger = logging.getLogger(__name__)

#: Seconds between two readings of the ops' counters while the engine is busy.
_OPS_INTERVAL_S = 0.5


@dataclass(frozen=True)
class Submission:
    """One request as the protocol hands it over."""

    request_id: str  #: unique among those in flight
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    prompt: str | None = None  #: only repeated in the output
    priority: int = 0  #: lower runs earlier, as in vLLM
    timeout_s: float | None = None  #: from now; then it ends with finish_reason "abort"
    cache_salt: str | None = None  #: prefix-cache pages are shared only with the same salt


class Bridge:
    """Runs ``llm``'s engine on a thread of its own for the event loop that called ``start``.

    As many sequences as the engine has seats are in flight, and at most ``max_waiting`` more; one
    more request is refused with QueueFullError. While the bridge runs, other calls of the LLM that
    need its engine raise UsageError. All methods but ``stats`` are for the event loop's thread.

    Up to ``stream_interval`` steps run in one native call while nothing waits (None: see ``Pace``):
    their tokens come together, and whatever arrives meanwhile waits for them.
    """

    def __init__(self, llm: LLM, *, max_waiting: int, stream_interval: int | None = None) -> None:
        if max_waiting < 0:
            raise UsageError(f"max_waiting={max_waiting} must not be negative")
        self._llm = llm
        self._max_waiting = max_waiting
        self._stream_interval = stream_interval
        self._engine: Engine | None = None
        self._draining = False
        self._death: EngineDeadError | None = None
        self._cause = ""
        # Of the event loop: what is in flight, and what waits for the engine thread.
        self._streams: dict[str, Stream] = {}
        self._calls: set[asyncio.Future[Any]] = set()
        # One thread, so that a flood of grammars takes one CPU at most.
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="sinterlm-grammar")
        # To the engine thread: what it does before its next step.
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # Of the engine thread: what it will deliver, and whether it was told to end.
        self._deltas: list[Delta] = []
        self._ending = False
        # Read by that thread alone: the model may be closed under anybody else.
        self._ops: tuple[OpStats, ...] = ()
        self._ops_time = -math.inf
        self._meter: RoofMeter | None = None

    @property
    def is_ready(self) -> bool:
        """Whether a submission would be admitted, the queue aside."""
        return self._engine is not None and not self._draining and self._death is None

    @property
    def failure(self) -> str | None:
        """Id and type of the exception that ended the engine thread; None while it lives."""
        return None if self._death is None else f"{self._death.error_id}: {self._cause}"

    # -- lifetime --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take the engine and start its thread. Raises UsageError while the LLM is in use."""
        if self._engine is not None:
            raise UsageError("this bridge has been started already; make a new one")
        self._engine = self._llm.lend_engine()
        self._loop = asyncio.get_running_loop()
        self._room = WaitingRoom(self._engine.step_limits.max_num_seqs, self._max_waiting)
        self._empty, self._ended = asyncio.Event(), asyncio.Event()
        self._empty.set()
        # A daemon: a step that hangs must not keep a process alive that was told to exit.
        self._thread = threading.Thread(target=self._run, name="sinterlm-engine", daemon=True)
        self._thread.start()

    async def stop(self, timeout_s: float) -> None:
        """Admit nothing, finish what was admitted, end the thread and give the engine back.

        What is not done after ``timeout_s`` seconds is aborted, and its stream says "shutdown".
        May be called again, then with a shorter time.
        """
        self._draining = True
        if self._engine is None:
            return
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except asyncio.TimeoutError:
            for stream in list(self._streams.values()):
                self._abort(stream, "shutdown")
        self._commands.put(self._end)
        self._compiler.shutdown(wait=False)
        await self._ended.wait()
        self._thread.join()  # its last act was to say so

    # -- requests --------------------------------------------------------------------------------

    async def prepare(self, params: SamplingParams) -> None:
        """Compile what ``params.structured_outputs`` asks for off the event loop, and keep it.

        ``submit`` then finds it; without, it compiles by itself, and everybody waits. Raises
        UsageError as ``submit`` would.
        """
        wanted = params.structured_outputs
        if wanted is not None:
            grammars = self._living_engine().grammars
            await self._loop.run_in_executor(self._compiler, grammars.prepare, wanted)

    def submit(self, submission: Submission) -> Stream:
        """Queue a request.

        Raises at once, and queues nothing then: PromptError, UsageError, ResourceError for a
        request that could not be served; QueueFullError, DrainingError, EngineDeadError for one
        that cannot be served now.
        """
        engine = self._living_engine()
        if self._draining:
            raise DrainingError("this server is shutting down; send the request to another")
        request_id = submission.request_id
        if request_id in self._streams:
            raise UsageError(f"request_id={request_id!r} is already running")
        self._room.check()
        group = engine.make_request(
            request_id,
            submission.prompt_token_ids,
            submission.params,
            prompt=submission.prompt,
            stream=True,
            priority=submission.priority,
            deadline=_deadline(submission.timeout_s),
            cache_salt=submission.cache_salt,
        )
        stream = Stream(request_id, self._loop, self._abort)
        self._streams[request_id] = stream
        self._room.enter(submission.params.n)
        self._empty.clear()
        self._commands.put(lambda: engine.admit(group))
        return stream

    async def run_idle(self, fn: Callable[[Engine], T]) -> T:
        """Run ``fn`` on the engine thread between two steps; its result or its exception.

        Everything in flight waits meanwhile. Raises EngineDeadError, and DrainingError once the
        engine has been given back.
        """
        engine = self._living_engine()
        if self._ended.is_set():
            raise DrainingError("this server has shut down")
        future: asyncio.Future[T] = self._loop.create_future()
        self._calls.add(future)

        def call() -> None:
            try:
                result = fn(engine)
            except Exception as exc:
                self._post(_fail, future, exc)
            else:
                self._post(_resolve, future, result)

        self._commands.put(call)
        try:
            return await future
        finally:
            self._calls.discard(future)

    async def measure_roof(self, seconds: float) -> None:
        """Measure the machine's peaks for about that long, so that ops are held against them.

        Everything in flight waits meanwhile. Without the memory that it takes (some hundred MB)
        their fractions stay unknown, which is logged.
        """
        try:
            self._meter = await self.run_idle(lambda engine: _meter(self._llm, engine, seconds))
        except ResourceError as exc:
            logger.warning("no fractions of the roof: %s", exc)

    def stats(self) -> EngineStats:
        """A snapshot of the engine, from any thread, also after it died."""
        if self._engine is None:
            raise UsageError("this bridge has not been started")
        return replace(self._engine.stats(), ops=self._ops)

    # -- on the event loop -----------------------------------------------------------------------

    def _living_engine(self) -> Engine:
        if self._death is not None:
            raise self._death
        if self._engine is None:
            raise UsageError("this bridge has not been started")
        return self._engine

    def _abort(self, stream: Stream, reason: AbortReason) -> None:
        if stream.request_id in self._streams and stream.abort_reason is None:
            stream.abort_reason = reason
            self._commands.put(lambda: self._abort_now(stream.request_id))

    def _deliver(self, deltas: list[Delta]) -> None:
        """Hand what the engine thread posted to its readers."""
        for delta in deltas:
            self._streams[delta.request_id].push(delta)
            if delta.finish_reason is not None:
                self._room.leave(1)
            if delta.output is not None:
                del self._streams[delta.request_id]
        if not self._streams:
            self._empty.set()

    def _close(self, death: EngineDeadError | None, cause: str) -> None:
        """The engine thread's last message: nothing that is still waited for will come."""
        self._death, self._cause = death, cause
        for stream in self._streams.values():
            stream.fail(death or DrainingError("this server has shut down"))
        for call in self._calls:
            _fail(call, death or DrainingError("this server has shut down"))
        self._streams.clear()
        self._empty.set()
        self._ended.set()

    # -- on the engine thread --------------------------------------------------------------------

    def _run(self) -> None:
        """The engine thread: obey, step, deliver, until told to end or something breaks."""
        assert self._engine is not None
        pace = Pace(self._stream_interval, self._engine.step_limits.num_scheduler_steps)
        death, cause = None, ""
        try:
            while not self._ending:
                self._obey(wait=not self._engine.has_unfinished)
                if self._engine.has_unfinished:
                    # What a step drew is delivered as the next one starts: then the front has the
                    # interpreter to itself, and keeps nobody from starting it.
                    drawn = self._engine.step(max_steps=pace.max_steps, launching=self._flush)
                    self._deltas += drawn  # by now a list of its own
                    pace.note(self._engine.last_step_seconds)
                self._read_ops()
                if not self._engine.has_unfinished:
                    self._flush()
        except BaseException as exc:  # whatever it is, somebody must be told
            death, cause = _log_death(exc), type(exc).__name__
        finally:
            self._flush()
            self._llm.return_engine()
            self._post(self._close, death, cause)

    def _flush(self) -> None:
        """Deliver what there is."""
        if self._deltas:
            self._post(self._deliver, self._deltas)
            self._deltas = []

    def _read_ops(self) -> None:
        """Ask the model what its ops have taken, now and then, and before falling asleep."""
        assert self._engine is not None
        now = time.monotonic()
        if now - self._ops_time >= _OPS_INTERVAL_S or not self._engine.has_unfinished:
            meter = self._meter
            self._ops = op_stats(
                self._llm.model.describe(), lambda name: meter.fraction(name) if meter else None
            )
            self._ops_time = now

    def _obey(self, *, wait: bool) -> None:
        """Carry out what the event loop asked for since the last step; sleep until it asks."""
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return
            command()
            wait = False

    def _abort_now(self, request_id: str) -> None:
        assert self._engine is not None
        for output in self._engine.abort([request_id]):
            self._deltas += _abort_deltas(output)

    def _end(self) -> None:
        self._ending = True

    def _post(self, fn: Callable[..., None], *args: object) -> None:
        """Run ``fn`` on the event loop, soon. Nobody is left to tell once the loop is closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(fn, *args)


def _meter(llm: LLM, engine: Engine, seconds: float) -> RoofMeter:
    """Probe the machine, and let the engine's steps be compared with what it can do."""
    manifest = llm.bundle.manifest
    gflops, gbytes = llm.model.probe(seconds)
    meter = RoofMeter(
        llm.model,
        manifest.ops,
        manifest.constants.windows,
        bytes_per_s=1e9 * gbytes,
        flops_per_s=1e9 * gflops,
    )
    engine.wrap_model(lambda _: meter)
    return meter


def _deadline(timeout_s: float | None) -> float | None:
    """The time of ``time.perf_counter`` that is ``timeout_s`` from now."""
    if timeout_s is None:
        return None
    if not (timeout_s > 0 and math.isfinite(timeout_s)):
        raise UsageError(f"timeout_s={timeout_s!r} must be a number of seconds above 0")
    return time.perf_counter() + timeout_s


def _log_death(exc: BaseException) -> EngineDeadError:
    """Log the exception under a new id, which is all that a client is shown of it."""
    error_id = uuid.uuid4().hex[:12]
    logger.critical("engine thread ended by %s, id %s", type(exc).__name__, error_id, exc_info=exc)
    return EngineDeadError(
        f"the engine failed (id {error_id}); the server is going down", error_id=error_id
    )


def _abort_deltas(output: RequestOutput) -> list[Delta]:
    """The last delta of each sequence that was aborted; the very last one carries the output."""
    aborted = [done.index for done in output.outputs if done.finish_reason == "abort"]
    deltas = [Delta(output.request_id, i, "", (), None, "abort") for i in aborted]
    deltas[-1] = replace(deltas[-1], output=output)
    return deltas


def _resolve(future: asyncio.Future[T], result: T) -> None:
    if not future.done():  # whoever asked may have been cancelled
        future.set_result(result)


def _fail(future: asyncio.Future[T], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
