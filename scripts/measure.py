"""Measures what the README claims: decode and prefill against this machine's own roof.

Probes of read bandwidth and of the dot-product peak alternate with the runs; medians of the runs
against the best probe. Weights of named configs are random: speed does not depend on their values.

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
    """One model's medians."""

    model: str
    decode_tokens_s: float
    decode_gbytes_s: float
    prefill_tokens_s: float
    prefill_gflops: float
    peak_gbytes_s: float
    peak_gflops: float

    def markdown(self) -> str:
        """The row of the table."""
        decode = self.decode_gbytes_s / self.peak_gbytes_s
        prefill = self.prefill_gflops / self.peak_gflops
        return (
            f"| {self.model} | {self.decode_tokens_s:.1f} | {self.decode_gbytes_s:.1f} of "
            f"{self.peak_gbytes_s:.1f} GB/s ({decode:.0%}) | {self.prefill_tokens_s:.0f} | "
            f"{self.prefill_gflops:.0f} of {self.peak_gflops:.0f} GFLOP/s ({prefill:.0%}) |"
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
        probes, decodes, prefills = [], [], []
        for salt in range(rounds):
            probes.append(llm.model.probe(0.6))
            # The difference of two lengths leaves the prompt and the first token out.
            long, short = timed(llm, PROMPT, DECODE + 1, salt), timed(llm, PROMPT, 1, salt)
            decodes.append((long - short) / DECODE)
            prefills.append(timed(llm, PREFILL, 1, salt))
        probes.append(llm.model.probe(0.6))
        step, prefill = statistics.median(decodes), statistics.median(prefills)
        flops = token_flops * PREFILL + pair_flops * PREFILL * (PREFILL + 1) / 2 + row_flops
        return Row(
            model,
            1 / step,
            weight_bytes / step / 1e9,
            PREFILL / prefill,
            flops / prefill / 1e9,
            max(b for _, b in probes),
            max(f for f, _ in probes),
        )


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
