"""What HTTP costs: the same requests through LLM.generate and a real `sinterlm serve`, interleaved.

python scripts/serve_overhead.py smollm2 --streams 1 64

Both run in processes of their own, one at a time, with the same options. The client decodes no
JSON while it measures. Prints output tokens/s of each round, medians, and the client's CPU share;
then the time to first token of a lone request against the engine's own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from statistics import median

import numpy as np

from sinterlm import LLM, SamplingParams

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64
ROUNDS = 5
OPTIONS = {"max_model_len": 512, "max_num_seqs": 64}
PARAMS = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)


@dataclass(frozen=True)
class Streamed:
    """What one streamed answer looked like on the wire."""

    ttft: float  #: seconds from the first byte sent to the first event
    num_events: int


class Server:
    """`sinterlm serve` in a process of its own, and a client that only counts events."""

    def __init__(self, model: str) -> None:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sinterlm.cli", "serve", model, "--port", "0", *flags],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found = re.search(r"http://([\d.]+):(\d+)", line)
        if found is None:
            raise SystemExit(f"no server: {line}")
        self._host, self._port = found[1], int(found[2])

    def close(self) -> None:
        """Drain and end."""
        self._process.terminate()
        self._process.wait(60)

    async def complete(self, prompt: list[int]) -> Streamed:
        """One streamed completion."""
        asked = {
            "prompt": prompt,
            "max_tokens": OUTPUT_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        body = json.dumps(asked).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection(self._host, self._port)
        start, first, num_events = time.perf_counter(), 0.0, 0
        writer.write(head.encode() + body)
        while data := await reader.read(1 << 16):
            num_events += data.count(b"data: {")
            if num_events and not first:
                first = time.perf_counter()
        writer.close()
        return Streamed(first - start, num_events)


class Runs:
    """The two ways to the same answers. Prompts never repeat, so that no prefix is found."""

    def __init__(self, llm: LLM, server: Server) -> None:
        self._llm, self._server = llm, server
        self._rng = np.random.default_rng(0)
        self.client_cpu: list[float] = []  #: seconds of CPU per second, of each HTTP round

    def prompts(self, count: int) -> list[list[int]]:
        """Fresh prompts of PROMPT_TOKENS tokens."""
        rows: list[list[int]] = self._rng.integers(1000, 40_000, (count, PROMPT_TOKENS)).tolist()
        return rows

    def offline(self, count: int) -> float:
        """Output tokens/s of LLM.generate."""
        prompts = self.prompts(count)
        start = time.perf_counter()
        self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], PARAMS)
        return count * OUTPUT_TOKENS / (time.perf_counter() - start)

    def http(self, count: int) -> float:
        """Output tokens/s of as many concurrent streams."""

        async def all_of_them() -> list[Streamed]:
            return await asyncio.gather(*map(self._server.complete, self.prompts(count)))

        start, cpu = time.perf_counter(), _cpu()
        streams = asyncio.run(all_of_them())
        seconds = time.perf_counter() - start
        self.client_cpu.append((_cpu() - cpu) / seconds)
        assert {stream.num_events for stream in streams} == {OUTPUT_TOKENS}, streams
        return count * OUTPUT_TOKENS / seconds

    def offline_ttft(self) -> float:
        """Seconds to the first delta of LLM.stream."""
        prompt = self.prompts(1)[0]
        start = time.perf_counter()
        stream = self._llm.stream({"prompt_token_ids": prompt}, PARAMS)
        next(stream)
        seconds = time.perf_counter() - start
        stream.close()
        return seconds

    def http_ttft(self) -> float:
        """Seconds to the first event."""
        return asyncio.run(self._server.complete(self.prompts(1)[0])).ttft


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure each number of streams, then the first token."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    server = Server(args.model)
    try:
        with LLM(args.model, max_model_len=512, max_num_seqs=64) as llm:
            runs = Runs(llm, server)
            for count in args.streams:
                throughput(runs, count, args.rounds)
            first_token(runs, 4 * args.rounds)
    finally:
        server.close()


def throughput(runs: Runs, count: int, rounds: int) -> None:
    """Interleave both ways after one round to warm up; print every rate and the medians."""
    runs.offline(count), runs.http(count)
    runs.client_cpu.clear()
    pairs = [(runs.offline(count), runs.http(count)) for _ in range(rounds)]
    offline, http = median(pair[0] for pair in pairs), median(pair[1] for pair in pairs)
    print(f"{count} streams, {PROMPT_TOKENS}/{OUTPUT_TOKENS} tokens; tokens/s offline, over HTTP:")
    print("  " + "  ".join(f"{pair[0]:.1f},{pair[1]:.1f}" for pair in pairs))
    print(
        f"  median {offline:.1f}, {http:.1f}: {100 * http / offline:.1f} %; "
        f"client CPU {100 * median(runs.client_cpu):.0f} % of one core",
        flush=True,
    )


def first_token(runs: Runs, rounds: int) -> None:
    """The same for the time to the first token of a lone request."""
    runs.offline_ttft(), runs.http_ttft()
    pairs = [(runs.offline_ttft(), runs.http_ttft()) for _ in range(rounds)]
    offline, http = median(pair[0] for pair in pairs), median(pair[1] for pair in pairs)
    print(
        f"time to first token alone: {1e3 * offline:.2f} ms offline, {1e3 * http:.2f} ms over HTTP "
        f"({1e3 * (http - offline):+.2f} ms), medians of {rounds}"
    )


if __name__ == "__main__":
    main()
