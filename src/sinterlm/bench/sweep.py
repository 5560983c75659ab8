"""Runs a sweep: start an engine, run every batch size, stop it, and so on to the last round.

Whatever fails is one point marked as failed with the end of the engine's log; the sweep goes on.
Interrupted, it keeps all points it has; the same command goes on from there.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sinterlm.bench import sanity
from sinterlm.bench.client import Target
from sinterlm.bench.datasets import RandomShape, Sampling, random_requests
from sinterlm.bench.engines.base import Engine, Launch, Seats, Variant, Weights
from sinterlm.bench.engines.process import Server, ServerDied, free_port, serving
from sinterlm.bench.load import run_load
from sinterlm.bench.offline import measure_offline
from sinterlm.bench.results import Peaks
from sinterlm.bench.serve_stats import serve_stats
from sinterlm.bench.setup import Tell
from sinterlm.bench.sweep_plan import (
    COLD,
    TUNE,
    LaunchSpec,
    SweepPlan,
    round_launches,
    save_or_check,
    side_launches,
)
from sinterlm.bench.sweep_store import LaunchFacts, Point, SweepStore
from sinterlm.bench.workload import Load, Request
from sinterlm.engine.tokenizer import Tokenizer
from sinterlm.errors import RuntimeFault, SinterError

#: Measures this machine now; None where it cannot.
Probe = Callable[[], Peaks | None]


@dataclass(frozen=True)
class Sweep:
    """One sweep and what it needs."""

    plan: SweepPlan
    engines: Mapping[str, Engine]  #: by name
    weights: Weights
    tokenizer: Tokenizer
    store: SweepStore
    probe: Probe
    tell: Tell
    start_timeout_s: float = 900.0
    retries_failed: bool = False
    deadline: float = math.inf  #: of ``time.monotonic``: no point begins after it

    def run(self) -> bool:
        """All launches that are not done yet; False where the time did not suffice.

        Raises KeyboardInterrupt, ResourceError.
        """
        save_or_check(self.plan, self.store.folder)
        variants = {name: [v.name for v in e.variants] for name, e in self.engines.items()}
        side = side_launches(self.plan, variants)
        for spec in side:
            self._launch(spec)
        best = self.best_variants()
        rounds = [
            spec
            for number in range(self.plan.rounds)
            for spec in round_launches(self.plan, number, best)
        ]
        for spec in rounds:
            self._launch(spec)
        return not any(self._todo(spec) for spec in [*side, *rounds])

    def _is_late(self) -> bool:
        return time.monotonic() > self.deadline

    def best_variants(self) -> dict[str, dict[int, str]]:
        """Engine -> batch size -> the flag set of most output tokens/s when all were tried."""
        tried: dict[tuple[str, int], dict[str, float]] = {}
        for point in self.store.points():
            if point.round_number == TUNE and point.is_good:
                speed = self._output_throughput(point)
                tried.setdefault((point.arm, point.batch_size), {})[point.variant] = speed
        best: dict[str, dict[int, str]] = {}
        for name, engine in self.engines.items():
            first = engine.variants[0].name
            best[name] = {}
            for size in self.plan.batch_sizes:
                speeds = tried.get((name, size), {})
                best[name][size] = max(speeds, key=lambda v: speeds[v]) if speeds else first
        return best

    def _output_throughput(self, point: Point) -> float:
        if point.result:
            return point.result["output_throughput"]
        return serve_stats(self.store.raw(point)).output_throughput

    # -- one launch --------------------------------------------------------------------------------

    def _launch(self, spec: LaunchSpec) -> None:
        todo = self._todo(spec)
        if self._is_late():
            return
        if not todo and not (spec.round_number == COLD and not self._was_launched(spec)):
            return
        self.tell(f"{spec.key}: starting")
        peaks = self.probe()
        engine = self.engines[spec.engine]
        variant = next(v for v in engine.variants if v.name == spec.variant)
        if self.plan.mode == "offline":
            self._offline(spec, engine, variant, todo, peaks)
            return
        port = free_port()
        with tempfile.TemporaryDirectory(prefix="sinterlm-bench-") as empty:
            launch = engine.launch(self.weights, variant, port, self._seats())
            if spec.round_number == COLD:
                cold = engine.cold_env(Path(empty))
                launch = replace(launch, env={**launch.env, **cold})
            self._serve(spec, launch, port, todo, peaks)

    def _serve(
        self, spec: LaunchSpec, launch: Launch, port: int, todo: Sequence[int], peaks: Peaks | None
    ) -> None:
        log = self.store.folder / "logs" / f"{spec.key}.log"
        pending = list(todo)
        try:
            with serving(launch, port, log, self.start_timeout_s) as server:
                while pending and not self._is_late():
                    self.store.add(self._point(spec, server, pending[0]))
                    pending.pop(0)
                self.store.add(_facts(spec, launch, peaks, server))
        except ServerDied as exc:
            self.store.add(_facts(spec, launch, peaks, None, str(exc)))
            for size in pending:
                failed = Point(spec.round_number, spec.arm, spec.variant, size, None, str(exc))
                self.store.add(failed)

    def _point(self, spec: LaunchSpec, server: Server, batch_size: int) -> Point:
        """One batch size. Raises ServerDied where there is no server any more."""
        plan = self.plan
        self.tell(f"{spec.key}: batch size {batch_size}")
        name = f"{spec.key}-b{batch_size}.jsonl"
        base = Point(spec.round_number, spec.arm, spec.variant, batch_size, None)
        try:
            server.reset_prefix_cache()
            raw = run_load(
                _target(server), Load(max_concurrency=batch_size),
                self._requests(plan.num_requests(batch_size), spec.round_number, batch_size),
                self.tokenizer, {"arm": spec.arm, "variant": spec.variant, "url": server.url},
            )  # fmt: skip
        except (SinterError, OSError) as exc:
            if not server.is_alive():
                raise ServerDied(f"the server died\n{server.log_tail()}") from exc
            return replace(base, failure=str(exc))
        if not raw.run.is_complete:
            raise KeyboardInterrupt
        raw = replace(raw, requests=tuple(record.as_told() for record in raw.requests))
        failure = sanity.failure_of(raw.requests)
        if failure is not None and not server.is_alive():
            raise ServerDied(f"the server died: {failure}\n{server.log_tail()}")
        self.store.add_raw(name, raw)
        if failure is not None:
            return replace(base, failure=f"{failure}\n{server.log_tail()}")
        return replace(base, raw=name, remarks=sanity.remarks_on(raw.requests))

    def _requests(self, count: int, round_number: int, batch_size: int) -> list[Request]:
        seed = self.plan.prompt_seed(round_number, batch_size)
        shape = RandomShape(self.plan.input_len, self.plan.output_len)
        return random_requests(self.tokenizer, shape, Sampling(count, seed, "bench-sweep-"))

    def _offline(
        self, spec: LaunchSpec, engine: Engine, variant: Variant, todo: Sequence[int],
        peaks: Peaks | None,
    ) -> None:  # fmt: skip
        """Each batch size is a process of its own."""
        for size in todo:
            if self._is_late():
                return
            self.tell(f"{spec.key}: batch size {size}, offline")
            base = Point(spec.round_number, spec.arm, spec.variant, size, None)
            log = self.store.folder / "logs" / f"{spec.key}-b{size}.log"
            try:
                found = measure_offline(engine, self.weights, variant, size, self.plan, log)
            except RuntimeFault as exc:
                self.store.add(replace(base, failure=str(exc)))
                continue
            self.store.add(replace(base, result=found))
        self.store.add(_facts(spec, Launch(()), peaks, None))

    # -- what is done ------------------------------------------------------------------------------

    def _todo(self, spec: LaunchSpec) -> list[int]:
        """Batch sizes of ``spec`` that have no point yet."""
        done = {
            point.batch_size
            for point in self.store.points()
            if (point.round_number, point.arm, point.variant)
            == (spec.round_number, spec.arm, spec.variant)
            and (point.is_good or not self.retries_failed)
        }
        return [size for size in spec.batch_sizes if size not in done]

    def _was_launched(self, spec: LaunchSpec) -> bool:
        return any(
            (one.round_number, one.arm) == (spec.round_number, spec.arm)
            and (one.failure is None or not self.retries_failed)
            for one in self.store.launches()
        )

    def _seats(self) -> Seats:
        return Seats(self.plan.most_seqs, self.plan.input_len + self.plan.output_len)


def _target(server: Server) -> Target:
    """Greedy, no early end, token ids, and what the engine needs beside.

    Every request has a connection of its own: llama-server closes some that it promised to keep.
    """
    body = {"temperature": 0.0, **server.launch.extra_body}
    return Target(
        server.url, server.model, extra_body=body, ignore_eos=True, send_token_ids=True,
        keep_alive=False,
    )  # fmt: skip


def _facts(
    spec: LaunchSpec, launch: Launch, peaks: Peaks | None, server: Server | None,
    failure: str | None = None,
) -> LaunchFacts:  # fmt: skip
    return LaunchFacts(
        spec.round_number,
        spec.arm,
        spec.variant,
        launch.command,
        dict(launch.env),
        server.startup_s if server is not None and server.child is not None else None,
        None if server is None else server.peak_memory(),
        "" if server is None else server.answer,
        None if peaks is None else peaks.bytes_per_s,
        None if peaks is None else peaks.flops_per_s,
        failure,
    )
