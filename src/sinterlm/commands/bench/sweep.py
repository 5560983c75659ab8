"""``sinterlm bench sweep``: every engine, every batch size, round after round; then `bench report`.

A folder holds a sweep. Interrupted or broken off, the same command goes on from there.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sinterlm.commands.bench.flags import parse_batch_sizes, parse_count
from sinterlm.commands.flags import parse_folder
from sinterlm.errors import SinterError, UsageError

if TYPE_CHECKING:
    from sinterlm.bench.engines import Home
    from sinterlm.bench.engines.base import Engine
    from sinterlm.bench.results import Peaks
    from sinterlm.bench.sweep_plan import SweepPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the subcommand takes."""
    parser.add_argument("weights", metavar="DIR", type=Path,
                        help="made by `bench make-checkpoint NAME --output DIR`")  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="of the sweep")
    group = parser.add_argument_group("engines")
    group.add_argument("--engine", action="append", metavar="NAME", required=True,
                       help="sinterlm:bf16, vllm, vllm+zentorch, llama.cpp:q8_0, NAME=http://..., "
                       "NAME=cmd:..., NAME=docker:...; several times")  # fmt: skip
    group.add_argument("--again", metavar="NAME",
                       help="engine of the A/A arm (default: the first)")  # fmt: skip
    group.add_argument("--no-again", action="store_true", help="no A/A arm, so no noise band")
    group.add_argument("--skip-missing", action="store_true",
                       help="leave out engines that cannot run here, and say so")  # fmt: skip
    add_home_flags(group)
    group = parser.add_argument_group("points")
    group.add_argument("--batch-sizes", type=parse_batch_sizes, metavar="LIST",
                       default=(1, 2, 4, 8, 16, 32, 64, 128), help="default: 1,2,4..")  # fmt: skip
    group.add_argument("--rounds", type=parse_count, default=5, metavar="N", help="default: 5")
    group.add_argument("--input-len", type=parse_count, default=128, metavar="N")
    group.add_argument("--output-len", type=parse_count, default=64, metavar="N",
                       help="of every request in every engine")  # fmt: skip
    group.add_argument("--waves", type=parse_count, default=2, metavar="N",
                       help="requests of a point, in batch sizes (default: 2)")  # fmt: skip
    group.add_argument("--min-requests", type=parse_count, default=4, metavar="N", help="at least")
    group.add_argument("--mode", choices=("serve", "offline"), default="serve")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--tune", action="store_true", help="try the flag grid of the peers first")
    group.add_argument("--no-cold", action="store_true", help="no start with empty caches")
    group.add_argument("--retry-failed", action="store_true", help="measure failed points again")
    group.add_argument("--time-limit", type=float, metavar="MIN",
                       help="stop after so many minutes; the same command goes on")  # fmt: skip
    group.add_argument("--start-timeout", type=float, default=900.0, metavar="S")


def add_home_flags(group: argparse._ArgumentGroup) -> None:
    """Where engines are installed and which CPUs they get."""
    group.add_argument("--engines-dir", type=parse_folder, metavar="DIR",
                       help="one environment for each engine (default: ~/.cache/sinterlm/engines)"
                       )  # fmt: skip
    group.add_argument("--engine-env", action="append", default=[], metavar="NAME=DIR",
                       help="an environment that lies elsewhere")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run what is left of the sweep; 1 where a point failed. Raises UsageError, ResourceError."""
    from sinterlm.bench.client import import_http
    from sinterlm.bench.engines.base import Weights
    from sinterlm.bench.facts import write_facts
    from sinterlm.bench.sweep import Sweep
    from sinterlm.bench.sweep_store import SweepStore
    from sinterlm.commands.bench.local import telling
    from sinterlm.commands.bench.tokenizer import tokenizer_of

    import_http()
    engines = engines_of(args.engine, home_of(args), args.skip_missing)
    weights = Weights(args.weights.resolve().name, args.weights)
    plan = plan_of(args, weights.name, list(engines))
    store = SweepStore(args.output)
    args.output.mkdir(parents=True, exist_ok=True)
    write_facts(args.output, engines, ["sinterlm", *sys.argv[1:]])
    tokenizer = tokenizer_of(str(weights.hf))
    deadline = math.inf
    if args.time_limit is not None:
        deadline = time.monotonic() + 60 * args.time_limit
    with telling() as tell:
        done = Sweep(plan, engines, weights, tokenizer, store, _Prober(str(weights.hf)).probe,
                     tell, args.start_timeout, args.retry_failed, deadline).run()  # fmt: skip
    failed = [point for point in store.points() if point.failure is not None]
    for point in failed:
        where = f"{point.arm} ({point.variant}), batch size {point.batch_size}"
        print(f"sinterlm: failed: {where}: {point.failure}", file=sys.stderr)
    if not done:
        print("not all is measured: time is up; the same command goes on", file=sys.stderr)
    print(f"{len(store.points())} points, {len(failed)} failed; now: sinterlm bench report "
          f"{args.output}")  # fmt: skip
    return 1 if failed else 0


def plan_of(args: argparse.Namespace, model: str, engines: list[str]) -> SweepPlan:
    """What the flags ask for. Raises UsageError."""
    from sinterlm.bench.sweep_plan import SweepPlan

    again = None if args.no_again else args.again or engines[0]
    has_cold = not args.no_cold and args.mode == "serve"
    return SweepPlan(
        model, tuple(engines), args.batch_sizes, args.rounds, args.input_len, args.output_len,
        args.waves, args.min_requests, args.seed, args.tune, has_cold, again, args.mode,
    )  # fmt: skip


def home_of(args: argparse.Namespace) -> Home:
    """Where engines are. Raises UsageError for a pair that is none."""
    from sinterlm.artifact.cache import locate_cache
    from sinterlm.bench.engines import Home
    from sinterlm.runtime.machine import read_machine

    elsewhere = {}
    for pair in args.engine_env:
        name, equals, folder = pair.partition("=")
        if not equals or not folder:
            raise UsageError(f"--engine-env {pair!r} is not NAME=DIR")
        elsewhere[name] = Path(folder)
    root = args.engines_dir or locate_cache(None) / "engines"
    return Home(root, read_machine().cpu_ids, elsewhere)


def engines_of(names: list[str], home: Home, skip_missing: bool) -> dict[str, Engine]:
    """Engines by name. Raises UsageError for one that cannot run here and may not be left out."""
    from sinterlm.bench.engines import engine_of

    found: dict[str, Engine] = {}
    for text in names:
        engine = engine_of(text, home)
        reason = engine.missing()
        if reason is None:
            found[engine.name] = engine
        elif skip_missing:
            print(f"sinterlm: left out {engine.name}: {reason}", file=sys.stderr)
        else:
            raise UsageError(f"{engine.name}: {reason}; or leave it out with --skip-missing")
    if not found:
        raise UsageError("no engine is left to measure")
    return found


class _Prober:
    """Measures this machine with a compiled library of the same model."""

    def __init__(self, model: str) -> None:
        self._model = model

    def probe(self) -> Peaks | None:
        """Peaks now; None where the model cannot be loaded beside what runs."""
        from sinterlm.bench.results import Peaks
        from sinterlm.commands.probe import probe_bundle
        from sinterlm.commands.ui import TerminalProgress
        from sinterlm.compile import compile_model
        from sinterlm.options import CompileOptions

        try:
            bundle = compile_model(CompileOptions(self._model), TerminalProgress(quiet=True))
            gflops, gbytes = probe_bundle(bundle)
        except SinterError as exc:
            print(f"sinterlm: warning: no probe of this machine: {exc}", file=sys.stderr)
            return None
        return Peaks(gbytes * 1e9, gflops * 1e9)
