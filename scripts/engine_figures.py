"""The engine's figures behind its defaults, on one model and without a server:

python scripts/engine_figures.py prefix smollm2        TTFT of a long beginning, first and again
python scripts/engine_figures.py mixed smollm2         prefill beside decodes, per budget
python scripts/engine_figures.py speculation smollm2   prompt lookup, where it helps and not
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median

import numpy as np

from sinterlm import LLM, SamplingParams
from sinterlm.engine.engine import Engine

VOCAB = 40_000
#: Ends with what it is asked to repeat: most of the answer stands in the prompt.
COPYING = """Repeat the following text exactly, word for word.

The keeper of the lighthouse climbed the stairs each evening at dusk, carrying a can of oil and a
clean cloth. He trimmed the wick, filled the lamp, wiped the glass until it shone, and lit the
flame. Then he sat by the window and wrote in his book the names of the ships that passed.

Once more:

The keeper of the lighthouse climbed the stairs each evening at dusk, carrying a can of oil and"""
INVENTING = "Once upon a time, in a village by the sea, there lived"


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["prefix", "mixed", "speculation"])
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=8, help="users of `mixed`")
    parser.add_argument("--budgets", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--tokens", type=int, default=2000, help="beginning of `prefix`")
    args = parser.parse_args()
    if args.what == "prefix":
        prefix(args.model, args.tokens)
    elif args.what == "mixed":
        mixed(args.model, args.streams, args.budgets)
    else:
        speculation(args.model)


def prefix(model: str, num_tokens: int) -> None:
    """A prompt of ``num_tokens`` tokens and a question behind it, three times over; then another
    question behind the same beginning."""
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    rng = np.random.default_rng(0)
    with LLM(model, max_model_len=num_tokens + 128, max_num_seqs=4) as llm:
        llm.generate({"prompt_token_ids": [1, 2, 3]}, params)
        for number in range(3):
            common = rng.integers(0, VOCAB, num_tokens).tolist()
            asks = [common + rng.integers(0, VOCAB, 20).tolist() for _ in range(2)]
            alone = []
            for ask in asks:
                llm.reset_prefix_cache()
                alone.append(llm.generate({"prompt_token_ids": ask}, params)[0])
            llm.reset_prefix_cache()
            order = [asks[0], asks[0], asks[1]]
            runs = [llm.generate({"prompt_token_ids": ask}, params)[0] for ask in order]
            same = [
                run.outputs[0].token_ids == one.outputs[0].token_ids
                for run, one in zip(runs, [alone[0], alone[0], alone[1]], strict=True)
            ]
            first, again, other = (run.metrics.ttft or 0.0 for run in runs)
            print(
                f"round {number}: TTFT first {first * 1e3:.1f} ms, again {again * 1e3:.1f} ms "
                f"(1/{first / again:.1f}), another question {other * 1e3:.1f} ms "
                f"(1/{first / other:.1f}); found {runs[1].num_cached_tokens}, "
                f"{runs[2].num_cached_tokens} tokens; tokens identical: {all(same)}"
            )


def mixed(model: str, streams: int, budgets: list[int]) -> None:
    """``streams`` users who ask again as soon as they are answered, per prefill budget."""
    for budget in budgets:
        with (
            LLM(model, max_model_len=1024, max_mixed_prefill_tokens=budget) as llm,
            _engine(llm) as e,
        ):
            _closed_loop(e, streams, streams)  # warm up
            start = time.perf_counter()
            stamps, ttfts = _closed_loop(e, streams, 3 * streams)
            elapsed = time.perf_counter() - start
        gaps = np.concatenate([np.diff(times) for times in stamps.values()]) * 1e3
        tokens = sum(map(len, stamps.values()))
        p50, p90, p99 = np.percentile(gaps, [50, 90, 99])
        t50, t99 = np.percentile(np.array(ttfts) * 1e3, [50, 99])
        print(
            f"budget {budget:4}: {tokens / elapsed:7.1f} tokens/s; "
            f"ITL p50 {p50:6.1f}, p90 {p90:6.1f}, p99 {p99:6.1f}, max {gaps.max():6.1f} ms; "
            f"TTFT p50 {t50:7.1f}, p99 {t99:7.1f} ms",
            flush=True,
        )


def _closed_loop(
    engine: Engine, streams: int, num_requests: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Token times of each request, and each one's TTFT; prompts of 64 to 448 tokens, answers of 32
    to 96, the same for every caller."""
    rng = np.random.default_rng(1)
    stamps: dict[str, list[float]] = defaultdict(list)
    ttfts = []
    sent = 0
    while sent < num_requests or engine.has_unfinished:
        while sent < num_requests and len(engine._groups) < streams:
            length, answer = int(rng.integers(64, 449)), int(rng.integers(32, 97))
            params = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True)
            ids = rng.integers(0, VOCAB, length)
            engine.add_request(f"{num_requests}-{sent}", ids, params, stream=True)
            sent += 1
        deltas = engine.step()
        now = time.perf_counter()
        for delta in deltas:
            stamps[delta.request_id].append(now)
            if delta.output is not None:
                ttfts.append(delta.output.metrics.ttft or 0.0)
    return stamps, ttfts


def speculation(model: str) -> None:
    """Greedy answers that copy and that invent, one and eight at a time, by guesses per step."""
    params = SamplingParams(temperature=0.0, max_tokens=96, ignore_eos=True)
    for name, prompt in (("copying", COPYING), ("inventing", INVENTING)):
        for count in (1, 8):
            for width in (0, 2, 4, 8):
                with LLM(model, max_model_len=1024, num_speculative_tokens=width) as llm:
                    prompts = [prompt] * count
                    asks = [replace(params, seed=i) for i in range(count)]
                    llm.generate(prompts, asks)
                    times = []
                    for _ in range(3):
                        start = time.perf_counter()
                        llm.generate(prompts, asks)
                        times.append(time.perf_counter() - start)
                    stats = llm._engine.stats()
                share = stats.spec_accepted_tokens / max(1, stats.spec_draft_tokens)
                print(
                    f"{name}, {count} at a time, {width} guesses: "
                    f"{count * 96 / median(times):7.1f} tokens/s, {share:.0%} of guesses right",
                    flush=True,
                )


@contextmanager
def _engine(llm: LLM) -> Iterator[Engine]:
    engine = llm.lend_engine()
    try:
        yield engine
    finally:
        llm.return_engine()


if __name__ == "__main__":
    main()
