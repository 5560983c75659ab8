"""Measures what the README claims: decode and prefill against this machine's own roof.

Every run stands between two probes of read bandwidth and of the dot-product peak, and is divided by
the better of the two; medians over the rounds. On a shared machine the bandwidth itself drifts, so
its range is printed too. Weights of named configs are random: speed does not depend on them.

    python scripts/measure.py [--rounds 5] [MODEL ...]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

from sinterlm import LLM, SamplingParams

PROMPT, DECODE, PREFILL = 16, 64, 512


@dataclass(frozen=True)
class Row:
    """One model, one entry per round: seconds, and the better of the probes around each."""

    model: str
    weight_bytes: int
    prefill_flops: float
    steps: list[float]  #: one decode step
    prefills: list[float]
    peaks: list[tuple[float, float]]  #: GFLOP/s, GB/s

    def markdown(self) -> str:
        """The row of the table."""
        step, prefill = statistics.median(self.steps), statistics.median(self.prefills)
        read = [self.weight_bytes / s / 1e9 for s in self.steps]
        done = [self.prefill_flops / s / 1e9 for s in self.prefills]
        decode = statistics.median(r / b for r, (_, b) in zip(read, self.peaks, strict=True))
        compute = statistics.median(d / f for d, (f, _) in zip(done, self.peaks, strict=True))
        bandwidths = [b for _, b in self.peaks]
        span = f"{min(bandwidths):.0f}–{max(bandwidths):.0f}"
        peak = max(f for f, _ in self.peaks)
        return (
            f"| {self.model} | {1 / step:.1f} "
            f"| {statistics.median(read):.1f} GB/s, {decode:.0%} of {span} "
            f"| {PREFILL / prefill:.0f} "
            f"| {statistics.median(done):.0f} GFLOP/s, {compute:.0%} of {peak:.0f} |"
        )


def timed(llm: LLM, num_prompt: int, num_new: int, salt: int) -> float:
    """Seconds of one greedy request."""
    vocab = llm.bundle.manifest.shape.vocab_size
    ids = [(i * 7919 + salt) % (vocab - 100) + 50 for i in range(num_prompt)]
    params = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True)
    start = time.perf_counter()
    llm.generate({"prompt_token_ids": ids}, params)
    return time.perf_counter() - start


def measure(model: str, rounds: int) -> Row:
    """Interleaved probes, decodes and prefills of one model."""
    dummy = model != "smollm2"
    with LLM(model, load_format="dummy" if dummy else "auto", max_model_len=2048) as llm:
        ops = llm.bundle.manifest.ops
        weight_bytes = sum(op.weight_bytes for op in ops)
        token_flops = sum(op.flops_per_token for op in ops)
        pair_flops = sum(op.flops_per_pair for op in ops)
        row_flops = sum(op.flops_per_row for op in ops)
        timed(llm, PREFILL, 8, 0)
        probe, steps, prefills, peaks = llm.model.probe(0.4), [], [], []
        for salt in range(rounds):
            # The difference of two lengths leaves the prompt and the first token out.
            long, short = timed(llm, PROMPT, DECODE + 1, salt), timed(llm, PROMPT, 1, salt)
            steps.append((long - short) / DECODE)
            prefills.append(timed(llm, PREFILL, 1, salt))
            after = llm.model.probe(0.4)
            peaks.append((max(probe[0], after[0]), max(probe[1], after[1])))
            probe = after
        flops = token_flops * PREFILL + pair_flops * PREFILL * (PREFILL + 1) / 2 + row_flops
        return Row(model, weight_bytes, flops, steps, prefills, peaks)


def first_token_seconds(cache: str) -> float:
    """From process start to the first token of SmolLM2, everything included."""
    command = [sys.executable, "-m", "sinterlm", "run", "smollm2", "--prompt", "Hello"]
    command += ["--max-tokens", "1", "--json"]
    start = time.perf_counter()
    done = subprocess.run(
        command, check=True, capture_output=True, env={**os.environ, "SINTERLM_CACHE_DIR": cache}
    )
    took = time.perf_counter() - start
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 1
    return took


def main() -> None:
    """Measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["smollm2", "qwen2.5-0.5b"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print("| model (bf16) | decode tok/s | weights read | prefill tok/s | prefill compute |")
    print("|---|---|---|---|---|")
    for model in args.models:
        print(measure(model, args.rounds).markdown(), flush=True)
    with tempfile.TemporaryDirectory() as cache:
        cold = first_token_seconds(cache)
        warm = statistics.median(first_token_seconds(cache) for _ in range(args.rounds))
    print(f"\nSmolLM2, process start to first token: cold {cold:.1f} s, warm {warm:.2f} s")


if __name__ == "__main__":
    main()
