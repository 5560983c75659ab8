"""What serving costs before any HTTP: the same requests through LLM.generate and the bridge.

python scripts/bridge_overhead.py smollm2 --streams 1 64
python scripts/bridge_overhead.py smollm2 --profile 64     where the Python time of a stream goes

Output tokens/s of both, interleaved, each the median of the rounds; and TTFT of a lone request.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import time
from collections.abc import Callable
from statistics import median
from unittest.mock import patch

import numpy as np

from sinterlm import LLM, SamplingParams
from sinterlm.serve.bridge import Bridge, Submission
from sinterlm.serve.stream import Stream

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64
PARAMS = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)


def main() -> None:
    """Measure each number of streams."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", type=int, metavar="STREAMS", help="profile instead of measure")
    args = parser.parse_args()
    with LLM(args.model, max_model_len=512, max_num_seqs=max(64, *args.streams)) as llm:
        run = Runs(llm)
        if args.profile is not None:
            profile(run, args.profile)
            return
        for streams in args.streams:
            throughput(run, streams, args.rounds)
        first_token(run, 4 * args.rounds)


class Runs:
    """The two ways through one engine. Prompts never repeat, so that no prefix is found."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._rng = np.random.default_rng(0)

    def prompts(self, count: int) -> list[list[int]]:
        """Fresh prompts of PROMPT_TOKENS tokens."""
        drawn = self._rng.integers(1000, 40_000, (count, PROMPT_TOKENS))
        rows: list[list[int]] = drawn.tolist()
        return rows

    def offline(self, count: int) -> float:
        """Output tokens/s of LLM.generate."""
        prompts = self.prompts(count)
        start = time.perf_counter()
        self.llm.generate([{"prompt_token_ids": p} for p in prompts], PARAMS)
        return count * OUTPUT_TOKENS / (time.perf_counter() - start)

    def bridged(self, count: int) -> float:
        """Output tokens/s of as many concurrent streams, each read to its end."""
        return asyncio.run(self._bridged(count))

    async def _bridged(self, count: int) -> float:
        bridge = Bridge(self.llm, max_waiting=count)
        await bridge.start()
        prompts = self.prompts(count)
        start = time.perf_counter()
        streams = [bridge.submit(Submission(str(i), p, PARAMS)) for i, p in enumerate(prompts)]
        await asyncio.gather(*map(_read, streams))
        seconds = time.perf_counter() - start
        await bridge.stop(10)
        return count * OUTPUT_TOKENS / seconds

    def offline_ttft(self) -> float:
        """Seconds to the first delta of LLM.stream."""
        prompt = self.prompts(1)[0]
        start = time.perf_counter()
        stream = self.llm.stream({"prompt_token_ids": prompt}, PARAMS)
        next(stream)
        seconds = time.perf_counter() - start
        stream.close()
        return seconds

    def bridged_ttft(self) -> float:
        """Seconds to the first delta of a stream."""

        async def first() -> float:
            bridge = Bridge(self.llm, max_waiting=1)
            await bridge.start()
            prompt = self.prompts(1)[0]
            start = time.perf_counter()
            stream = bridge.submit(Submission("r", prompt, PARAMS))
            await stream.__anext__()
            seconds = time.perf_counter() - start
            stream.cancel()
            await bridge.stop(10)
            return seconds

        return asyncio.run(first())


async def _read(stream: Stream) -> None:
    async for _ in stream:
        pass


def throughput(run: Runs, streams: int, rounds: int) -> None:
    """Print both rates and their ratio."""
    offline, bridged = interleaved(
        [lambda: run.offline(streams), lambda: run.bridged(streams)], rounds
    )
    print(
        f"{streams} streams, {PROMPT_TOKENS}/{OUTPUT_TOKENS}: offline {offline:.1f} tok/s, "
        f"bridge {bridged:.1f} tok/s, {100 * bridged / offline:.1f} %"
    )


def first_token(run: Runs, rounds: int) -> None:
    """Print both times to the first token and their difference."""
    offline, bridged = interleaved([run.offline_ttft, run.bridged_ttft], rounds)
    print(
        f"TTFT at concurrency 1: offline {1e3 * offline:.2f} ms, bridge {1e3 * bridged:.2f} ms, "
        f"{1e3 * (bridged - offline):+.2f} ms"
    )


def interleaved(ways: list[Callable[[], float]], rounds: int) -> list[float]:
    """Median of each way over rounds that take turns; the first, unmeasured, warms up."""
    results = [[way() for way in ways] for _ in range(rounds + 1)][1:]
    return [median(column) for column in zip(*results, strict=True)]


def profile(run: Runs, streams: int) -> None:
    """Print the functions of the engine's thread, then of the event loop's, by their own time."""
    run.bridged(streams)
    engine, loop = cProfile.Profile(), cProfile.Profile()
    plain = Bridge._run
    with patch.object(Bridge, "_run", lambda bridge: engine.runcall(plain, bridge)):
        run.bridged(streams)
    loop.runcall(run.bridged, streams)
    for name, one in (("engine thread", engine), ("event loop", loop)):
        print(f"--- {name}")
        pstats.Stats(one).sort_stats("tottime").print_stats(18)


if __name__ == "__main__":
    main()
