"""What HTTP costs: the same requests through LLM.generate and a real `sinterlm serve`, interleaved.

python scripts/serve_overhead.py smollm2 --streams 1 64

Both run in processes of their own, one at a time, with the same options. The client decodes no
JSON while it measures. Prints output tokens/s of each round and medians, the CPU time that each
side spent per token (which a busy machine changes little), and the client's share of a core; then
the time to first token of a lone request against the engine's own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from sinterlm import LLM, SamplingParams

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64
MAX_MODEL_LEN, MAX_NUM_SEQS = 512, 64
PARAMS = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)


@dataclass(frozen=True)
class Streamed:
    """What one streamed answer looked like on the wire."""

    ttft: float  #: seconds from the first byte sent to the first event
    num_events: int


class Server:
    """`sinterlm serve` in a process of its own, and a client that only counts events."""

    def __init__(self, model: str, num_threads: int | None, stream_interval: int | None) -> None:
        flags = ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_NUM_SEQS)]
        if stream_interval is not None:
            flags += ["--stream-interval", str(stream_interval)]
        if num_threads is not None:
            flags += ["--num-threads", str(num_threads)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sinterlm.cli", "serve", model, "--port", "0",
             "--log-level", "warning", *flags],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found = re.search(r"http://([\d.]+):(\d+)", line)
        if found is None:
            raise SystemExit(f"no server: {line}")
        self._host, self._port = found[1], int(found[2])

    def cpu(self) -> float:
        """Seconds of CPU that the server has used so far."""
        words = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

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


@dataclass(frozen=True)
class Round:
    """One measurement of one way."""

    rate: float  #: output tokens/s
    cpu_ms: float  #: CPU time per output token, of the engine and its front
    client_share: float  #: of a core, that the client used


class Runs:
    """The two ways to the same answers. Prompts never repeat, so that no prefix is found."""

    def __init__(self, llm: LLM, server: Server) -> None:
        self._llm, self._server = llm, server
        self._rng = np.random.default_rng(0)

    def prompts(self, count: int) -> list[list[int]]:
        """Fresh prompts of PROMPT_TOKENS tokens."""
        rows: list[list[int]] = self._rng.integers(1000, 40_000, (count, PROMPT_TOKENS)).tolist()
        return rows

    def offline(self, count: int) -> Round:
        """All of them through LLM.generate."""
        prompts, num_tokens = self.prompts(count), count * OUTPUT_TOKENS
        start, cpu = time.perf_counter(), _cpu()
        self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], PARAMS)
        seconds = time.perf_counter() - start
        return Round(num_tokens / seconds, 1e3 * (_cpu() - cpu) / num_tokens, 0.0)

    def http(self, count: int) -> Round:
        """All of them as concurrent streams."""

        async def all_of_them() -> list[Streamed]:
            return await asyncio.gather(*map(self._server.complete, self.prompts(count)))

        num_tokens = count * OUTPUT_TOKENS
        start, own, cpu = time.perf_counter(), _cpu(), self._server.cpu()
        streams = asyncio.run(all_of_them())
        seconds, own = time.perf_counter() - start, _cpu() - own
        assert {stream.num_events for stream in streams} == {OUTPUT_TOKENS}, streams
        spent = 1e3 * (self._server.cpu() - cpu) / num_tokens
        return Round(num_tokens / seconds, spent, own / seconds)

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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-threads", type=int, help="of either engine (default: every CPU)")
    parser.add_argument("--stream-interval", type=int, help="of the server (default: its own)")
    args = parser.parse_args()
    server = Server(args.model, args.num_threads, args.stream_interval)
    try:
        with LLM(
            args.model,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            num_threads=args.num_threads,
        ) as llm:
            runs = Runs(llm, server)
            for count in args.streams:
                throughput(runs, count, args.rounds)
            first_token(runs, 4 * args.rounds)
    finally:
        server.close()


def throughput(runs: Runs, count: int, rounds: int) -> None:
    """Interleave both ways after one round to warm up; print every rate and the medians."""
    pairs = [(runs.offline(count), runs.http(count)) for _ in range(rounds + 1)][1:]
    offline, http = (list(column) for column in zip(*pairs, strict=True))
    print(f"{count} streams, {PROMPT_TOKENS}/{OUTPUT_TOKENS} tokens; tokens/s offline, over HTTP:")
    print("  " + "  ".join(f"{one.rate:.1f},{other.rate:.1f}" for one, other in pairs))
    rates = [median(one.rate for one in way) for way in (offline, http)]
    spent = [median(one.cpu_ms for one in way) for way in (offline, http)]
    share = median(one.client_share for one in http)
    print(
        f"  medians {rates[0]:.1f}, {rates[1]:.1f}: {100 * rates[1] / rates[0]:.1f} %; CPU per "
        f"token {spent[0]:.3f} ms, {spent[1]:.3f} ms ({spent[1] - spent[0]:+.3f}); client "
        f"{100 * share:.0f} % of a core",
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
