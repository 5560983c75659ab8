"""``tune()``: plan -> tasks -> rounds of candidates -> tile table."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sinterlm import compile as compiler
from sinterlm.artifact.progress import Progress
from sinterlm.artifact.storage import disk_errors
from sinterlm.backends.gpu import library, objects
from sinterlm.backends.gpu.backend import GpuBackend
from sinterlm.backends.gpu.devices import DEVICES
from sinterlm.backends.gpu.tuning import TileTable, parse_tiles, read_tiles, tuned_path
from sinterlm.errors import ResourceError, UsageError
from sinterlm.options import CompileOptions
from sinterlm.tune.catalogue import Sizes, tasks_of
from sinterlm.tune.choice import Chosen, choose, rates_of, tuned_table
from sinterlm.tune.journal import Journal
from sinterlm.tune.search import Search, Tuner
from sinterlm.tune.tasks import nothing
from sinterlm.tune.timer import Timer, TrialFailed, WorkerTimer

#: Makes the timer from the host library and the seconds that a candidate may take.
MakeTimer = Callable[[bytes, float], AbstractContextManager[Timer]]


@dataclass(frozen=True)
class TuneOptions:
    """What is tuned, and for how long."""

    ops: tuple[str, ...] = ()  #: () = all GEMMs, and attention
    sizes: Sizes = field(default_factory=Sizes)
    time_limit_s: float = float("inf")
    max_candidates: int = 48  #: of each op and number of rows
    candidate_limit_s: float = 60.0  #: a candidate that takes longer has failed
    output: Path | None = None  #: None = where ``sinterlm compile`` looks for it


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    output: Path
    device: str
    driver: str
    is_complete: bool  #: no candidate was left when it ended
    counts: dict[str, int]  #: candidates by state, those that the journal knew included
    rows: list[dict[str, Any]]  #: of each task that has times: start, best, its tile


def tune(
    options: CompileOptions,
    wanted: TuneOptions,
    progress: Progress,
    make_timer: MakeTimer = WorkerTimer,
) -> Outcome:
    """Time candidates on the first visible device and write the tile table of the best.

    The table is written however it ends, Ctrl-C included, from what was measured until then; what
    is measured is in a journal beside it and is not measured again. Raises UsageError,
    CheckpointError, CompileError as compiling does, and ResourceError where nothing can be timed.
    """
    began = time.monotonic()
    _check(wanted)
    job = compiler.resolve(options, progress)
    backend = job.backend
    if not isinstance(backend, GpuBackend):
        raise UsageError(f"--target {options.target} has no tiles; choose {', '.join(DEVICES)}")
    with compiler.read(job) as checkpoint:
        plan = compiler.plan_model(job, checkpoint)
    device = backend.device
    # Not from what an earlier run left: the search then takes the same way again, and goes on.
    tiles = backend.tiles if options.tiles is not None else read_tiles(device.name)
    tasks = tasks_of(plan, device, tiles, wanted.ops, wanted.sizes)
    output = wanted.output or tuned_path(job.cache.root, device.name)
    before = _read(output, device.name)
    progress.stage("tune tiles")
    with make_timer(library.host_library(job.cache.memo), wanted.candidate_limit_s) as timer:
        try:
            found = timer.time(nothing(tiles), [])
        except TrialFailed as exc:
            raise ResourceError(f"the device cannot be opened: {exc}") from exc
        with disk_errors(output.parent, "give another --output"):
            journal = Journal(Path(f"{output}.journal"), found.device)
            if len(journal):
                progress.notify(f"{len(journal)} candidates are known from {journal.path}")
            searches = [Search(task, wanted.max_candidates) for task in tasks]
            tuner = Tuner(
                lambda kernels: objects.compile_each(kernels, device, job.cache.memo), timer,
                journal, began + wanted.time_limit_s, progress.notify, found.device, found.driver,
            )  # fmt: skip
            is_complete = False
            try:
                cpus = len(os.sched_getaffinity(0))
                is_complete = tuner.run(searches, -(-2 * cpus // len(searches)))
            finally:
                chosen = choose(searches)
                if chosen:
                    _write(output, tuned_table(device.name, chosen, before))
    if not chosen:
        raise ResourceError(_nothing_measured(searches, is_complete, journal.path))
    return Outcome(output, found.device, found.driver, is_complete, _counts(searches),
                   [_row(one, searches) for one in chosen])  # fmt: skip


def _check(wanted: TuneOptions) -> None:
    if wanted.max_candidates < 1:
        raise UsageError(f"--max-candidates {wanted.max_candidates} must be at least 1")
    for name, value in (("--time-limit", wanted.time_limit_s),
                        ("--candidate-timeout", wanted.candidate_limit_s)):  # fmt: skip
        if not value > 0:
            raise UsageError(f"{name} must be above 0")


def _read(path: Path, target: str) -> TileTable | None:
    """The table that is there already. Raises UsageError for another file."""
    if not path.exists():
        return None
    try:
        table = parse_tiles(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise UsageError(f"{path} is no tile table ({exc}); give another --output") from exc
    if table.target != target:
        raise UsageError(f"{path} has tiles for {table.target}; give another --output")
    return table


def _write(path: Path, table: TileTable) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(table.to_json(), encoding="utf-8")
    os.replace(new, path)


def _nothing_measured(searches: Sequence[Search], is_complete: bool, journal: Path) -> str:
    tried = [result for s in searches for _, result in s.tried.values()]
    if not tried:
        return "no candidate was measured within --time-limit; give more minutes, or fewer --ops"
    last = f"{tried[-1].task}: {tried[-1].why}"
    return f"none of {len(tried)} candidates could be timed, the last one: {last}; see {journal}"


def _counts(searches: Sequence[Search]) -> dict[str, int]:
    counts = {"measured": 0, "refused": 0, "failed": 0}
    for search in searches:
        for _, result in search.tried.values():
            counts[result.state] += 1
    return counts


def _row(chosen: Chosen, searches: Sequence[Search]) -> dict[str, Any]:
    """Facts of one task for people and ``--json``; ``start_us`` None where it has no times."""
    task, kernel, result = chosen
    search = next(s for s in searches if s.task is task)
    start = search.tried.get(search.space[0])
    measured = start is not None and start[1].state == "measured"
    return {
        "task": task.name, "bytes": {task.label(step): task.nbytes(step) for step in task.steps},
        "candidates": len(search.tried),
        "us": result.us, "start_us": start[1].us if start and measured else None,
        "cut": result.cut, "options": kernel.options,
        "gb_per_s": rates_of(task, result.us),
    }  # fmt: skip


def named(options: CompileOptions) -> CompileOptions:
    """``options`` for a model of which shapes are enough: a named config needs no weights."""
    from sinterlm.frontend.named_configs import named_configs

    if options.model not in named_configs():
        return options
    return replace(options, load_format="dummy")


def to_json(outcome: Outcome) -> str:
    """One JSON object."""
    return json.dumps({**vars(outcome), "output": str(outcome.output)})
