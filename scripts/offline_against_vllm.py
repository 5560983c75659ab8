"""SinterLM's offline engine against vLLM's, the same folder and lengths, launch after launch.

    sinterlm bench make-checkpoint smollm2 --output build/bench/smollm2
    python scripts/offline_against_vllm.py build/bench/smollm2/hf --rounds 3

A round is one launch of each, in a fresh order; every launch measures all batch sizes. Ratios are
medians over the rounds. Further flags of `sinterlm bench throughput` stand behind `--`: with
`-- --quantization int8` ours has narrower weights, and the table must say so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from statistics import median

from sinterlm.bench.engines import Home, engine_of
from sinterlm.bench.engines.base import DEFAULT, Seats, Weights
from sinterlm.bench.engines.vllm import VLLM

Case = tuple[float, float]  #: total tokens/s; median decode step in ms


def main() -> None:
    """Alternate, and print a line for each batch size."""
    own = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="Hugging Face folder")
    parser.add_argument("--engine", default="vllm+zentorch", help="vllm or vllm+zentorch")
    parser.add_argument("--engines-dir", type=Path, default=Path.home() / ".cache/sinterlm/engines")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(sys.argv[1:own])
    home = Home(args.engines_dir, tuple(sorted(os.sched_getaffinity(0))))
    engine = engine_of(args.engine, home)
    if not isinstance(engine, VLLM) or (why := engine.missing()) is not None:
        sys.exit(why if isinstance(engine, VLLM) else f"{args.engine} is not vLLM")
    ours: dict[int, list[Case]] = {}
    theirs: dict[int, list[Case]] = {}
    for number in range(args.rounds):
        for found in random.Random(number).sample([ours, theirs], 2):
            cases = run_ours(args, sys.argv[own + 1 :]) if found is ours else run_vllm(args, engine)
            for size, case in cases.items():
                found.setdefault(size, []).append(case)
            name = "sinterlm" if found is ours else engine.name
            print(f"round {number + 1}: {name} {cases}", flush=True)
    print(table(engine.name, ours, theirs))


def table(name: str, ours: dict[int, list[Case]], theirs: dict[int, list[Case]]) -> str:
    """Medians, and the medians of the ratios of each round."""
    lines = [
        f"| batch size | total tokens/s | {name} | ratio | decode step, ms | {name} | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for size, mine in ours.items():
        cells = []
        for part in (0, 1):
            a, b = [case[part] for case in mine], [case[part] for case in theirs[size]]
            pairs = zip(a, b, strict=True)
            ratio = median(x / y if part == 0 else y / x for x, y in pairs)
            cells += [f"{median(a):.1f}", f"{median(b):.1f}", f"{ratio:.2f}"]
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run_ours(args: argparse.Namespace, more: list[str]) -> dict[int, Case]:
    """One launch of `sinterlm bench throughput`."""
    command = [
        sys.executable, "-m", "sinterlm", "bench", "throughput", args.folder, "--json", "--rounds",
        1, "--batch-sizes", ",".join(map(str, args.batch_sizes)), "--input-len", args.input_len,
        "--output-len", args.output_len, "--max-num-seqs", max(args.batch_sizes),
        "--max-model-len", args.input_len + args.output_len + 64, *(more or ["--dtype", "bf16"]),
    ]  # fmt: skip
    report = json.loads(run([str(word) for word in command], {}).splitlines()[-1])
    return {
        size: (case["total_tokens_per_s"], case["median_decode_step_s"] * 1e3)
        for size, case in zip(args.batch_sizes, report["cases"], strict=True)
    }


def run_vllm(args: argparse.Namespace, engine: VLLM) -> dict[int, Case]:
    """One launch of vLLM, with the environment that its authors advise."""
    weights = Weights(args.folder.parent.name, args.folder.parent)
    seats = Seats(max(args.batch_sizes), args.input_len + args.output_len)
    command = [
        str(engine.environment.python), str(Path(__file__).with_name("vllm_offline.py")),
        str(args.folder), "--input-len", str(args.input_len), "--output-len", str(args.output_len),
        "--batch-sizes", *map(str, args.batch_sizes),
    ]  # fmt: skip
    text = run(command, dict(engine.launch(weights, DEFAULT, 1, seats).env))
    lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"batch_size"')]
    return {
        line["batch_size"]: (line["total_tokens_per_s"], line["median_decode_step_s"] * 1e3)
        for line in lines  # the last one of a size counts
    }


def run(command: list[str], env: dict[str, str]) -> str:
    """What it prints. Exits with the end of its log where it fails."""
    done = subprocess.run(
        command, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command[:4])} failed:\n{done.stdout[-800:]}{done.stderr[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
