"""SinterLM against stock servers over HTTP, with `vllm bench serve` as the one client.

    sinterlm bench make-checkpoint smollm2 --output build/bench/smollm2
    python scripts/stock_over_http.py build/bench/smollm2 --engine sinterlm:bf16 --engine vllm \\
        --engine llama.cpp:bf16 --vllm ENV/bin/vllm --output build/stock

All servers run at once and one is asked at a time: in every round each concurrency goes through the
engines in a fresh random order. Prompts are the same for all, 64 tokens are forced of each, and
rates are requests x tokens / duration, so that no server's count of its tokens matters. A point
that is in OUTPUT already is kept, so a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from sinterlm.bench.engines import Home, engine_of
from sinterlm.bench.engines.base import DEFAULT, Seats, Weights
from sinterlm.bench.engines.process import Server, free_port, serving

INPUT_TOKENS, OUTPUT_TOKENS = 128, 64
START_S = 900.0
TRIES = 4
#: Concurrency -> requests of one run: one wave, or four where a wave is short.
REQUESTS = {1: 4, 8: 16}


def measure(args: argparse.Namespace, server: Server, concurrency: int, seed: int, to: Path
            ) -> dict[str, Any]:  # fmt: skip
    """What the client saved of one run, run again where a server dropped a connection it had kept
    (the client does not ask twice). Exits where that happens TRIES times."""
    count = REQUESTS.get(concurrency, concurrency)
    for _ in range(TRIES):
        if not to.exists():
            server.reset_prefix_cache()
            run_client(args, server, concurrency, count, seed, to)
        saved: dict[str, Any] = json.loads(to.read_text())
        if saved["completed"] == count:
            return saved
        to.unlink()
        print(f"{to.stem}: {saved['completed']} of {count} completed; once more", flush=True)
    sys.exit(f"{to.stem}: requests failed {TRIES} times; see the logs in {to.parent}")


def run_client(
    args: argparse.Namespace, server: Server, concurrency: int, count: int, seed: int, to: Path
) -> None:
    """One run of `vllm bench serve`. Exits where it fails."""
    command = [
        args.vllm, "bench", "serve", "--backend", "openai", "--base-url", server.url,
        "--endpoint", "/v1/completions", "--model", server.model,
        "--tokenizer", args.weights / "hf", "--dataset-name", "random",
        "--random-input-len", INPUT_TOKENS, "--random-output-len", OUTPUT_TOKENS,
        "--num-prompts", count, "--max-concurrency", concurrency, "--seed", seed,
        "--ignore-eos", "--temperature", 0, "--disable-tqdm",
        "--percentile-metrics", "ttft,tpot,itl,e2el",
        "--extra-body", json.dumps(dict(server.launch.extra_body)),
        "--save-result", "--result-dir", to.parent, "--result-filename", to.name,
    ]  # fmt: skip
    done = subprocess.run(
        [str(word) for word in command], env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode or not to.exists():
        sys.exit(f"the client failed at {to.name}:\n{done.stdout[-800:]}{done.stderr[-2000:]}")


def figures(saved: dict[str, Any]) -> tuple[float, float, float]:
    """Tokens/s in and out, mean TTFT and mean TPOT in ms: every output has the same length."""
    rate = saved["completed"] * (INPUT_TOKENS + OUTPUT_TOKENS) / saved["duration"]
    ttft, e2el = saved["mean_ttft_ms"], saved["mean_e2el_ms"]
    return rate, ttft, (e2el - ttft) / (OUTPUT_TOKENS - 1)


def table(points: dict[tuple[str, int], list[dict[str, Any]]]) -> str:
    """Medians over the rounds, one line for each concurrency and engine."""
    lines = [
        "| concurrency | engine | total tokens/s | mean TTFT, ms | mean TPOT, ms | rounds |",
        "|---|---|---|---|---|---|",
    ]
    for (name, concurrency), runs in sorted(points.items(), key=lambda item: item[0][1]):
        rates, ttft, tpot = zip(*map(figures, runs), strict=True)
        spread = f"{median(rates):.1f} ({min(rates):.1f}–{max(rates):.1f})"
        lines.append(
            f"| {concurrency} | {name} | {spread} | {median(ttft):.0f} | {median(tpot):.1f} "
            f"| {len(runs)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, start the servers, measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", type=Path, help="folder of `sinterlm bench make-checkpoint`")
    parser.add_argument("--engine", action="append", required=True, metavar="NAME")
    parser.add_argument("--engines-dir", type=Path, default=Path.home() / ".cache/sinterlm/engines")
    parser.add_argument("--vllm", type=Path, required=True, help="the client's program")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True, help="results and logs go here")
    args = parser.parse_args()
    weights = Weights(args.weights.name, args.weights)
    home = Home(args.engines_dir, tuple(sorted(os.sched_getaffinity(0))))
    seats = Seats(max(args.concurrency), INPUT_TOKENS + OUTPUT_TOKENS)
    args.output.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    points: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        servers = {}
        for name in args.engine:
            engine = engine_of(name, home)
            if (why := engine.missing()) is not None:
                sys.exit(why)
            port = free_port()
            launch = engine.launch(weights, DEFAULT, port, seats)
            log = args.output / f"{name.replace(':', '-')}.log"
            servers[name] = stack.enter_context(serving(launch, port, log, START_S))
            print(f"{name}: {servers[name].startup_s:.1f} s to the first answer", flush=True)
        for round_ in range(args.rounds):
            for concurrency in args.concurrency:
                for name in draw.sample(args.engine, len(args.engine)):
                    to = args.output / f"{name.replace(':', '-')}-{concurrency}-{round_}.json"
                    saved = measure(args, servers[name], concurrency, round_, to)
                    points.setdefault((name, concurrency), []).append(saved)
                    rate, ttft, tpot = figures(saved)
                    print(
                        f"round {round_ + 1}, {concurrency}: {name} {rate:.1f} tokens/s, TTFT "
                        f"{ttft:.0f} ms, TPOT {tpot:.1f} ms",
                        flush=True,
                    )
    print(table(points))


if __name__ == "__main__":
    main()
