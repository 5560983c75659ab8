"""Drives `sinterlm bench serve` and `vllm bench serve` against one server, and compares them.

    python scripts/bench_parity.py --vllm-python VENV/bin/python --tokenizer DIR/hf
    make bench-parity        (vLLM 0.32 installed by `sinterlm bench setup vllm`)

The server is ``mock_openai.py`` with a scripted trace, at concurrency 1, 8 and 64. Means of TTFT,
TPOT, ITL and E2EL must agree to 1 ms, throughputs to 0.5 %; a machine that is busy elsewhere gets
more than one try. Exit code 1 when they do not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
METRICS = ("ttft", "tpot", "itl", "e2el")
THROUGHPUTS = ("request_throughput", "output_throughput", "total_token_throughput")
MS, SHARE = 1.0, 0.005  #: largest differences


def plans(count: int, concurrency: int) -> list[dict[str, Any]]:
    """A seeded trace: as many chunks a second in all, whatever the concurrency."""
    draw = random.Random(concurrency)
    gap = 0.01 if concurrency < 64 else 0.06
    made = []
    for _ in range(count):
        first = draw.uniform(2, 6) * gap
        rest = [draw.uniform(0.5, 1.5) * gap for _ in range(draw.randint(15, 31))]
        made.append({"delays_s": [first, *rest]})
    return made


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(url: str, child: subprocess.Popen[bytes]) -> None:
    """Until the server answers."""
    for _ in range(600):
        try:
            urllib.request.urlopen(url + "/health", timeout=5)
            return
        except OSError:
            if child.poll() is not None:
                raise SystemExit("the server ended at once") from None
            time.sleep(0.1)
    raise SystemExit("the server did not start")


#: Runs inside vLLM's environment: `vllm bench serve` for each list of arguments that comes in.
#: One process, because importing vLLM takes longer than all the runs.
VLLM_CLIENT = """
import argparse, json, sys
from vllm.benchmarks import serve
real, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    serve.main(parser.parse_args(json.loads(line)))
    print("done", file=real, flush=True)
"""


class Vllm:
    """`vllm bench serve`, started once."""

    def __init__(self, python: str, log: Path) -> None:
        self._log = log
        command = [python, "-c", VLLM_CLIENT]
        self.child = subprocess.Popen(command, text=True, stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, stderr=log.open("w"))  # fmt: skip

    def run(self, arguments: list[str]) -> None:
        """One run. Ends this script where it fails."""
        assert self.child.stdin is not None and self.child.stdout is not None
        print(json.dumps(arguments), file=self.child.stdin, flush=True)
        if self.child.stdout.readline() != "done\n":
            raise SystemExit(f"vLLM's client failed:\n{self._log.read_text()[-3000:]}")


def run_sinterlm(arguments: list[str]) -> None:
    """One run. Ends this script where it fails."""
    command = [sys.executable, "-m", "sinterlm", "bench", "serve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(
            f"{shlex.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )


def arguments_of(url: str, tokenizer: str, concurrency: int, count: int, result: Path) -> list[str]:
    """What both clients get. Warm-ups open every connection beforehand."""
    return [
        "--backend", "openai", "--base-url", url, "--model", tokenizer, "--tokenizer", tokenizer,
        "--dataset-name", "random", "--random-input-len", "16", "--random-output-len", "32",
        "--num-prompts", str(count), "--max-concurrency", str(concurrency), "--num-warmups",
        str(concurrency), "--percentile-metrics", "ttft,tpot,itl,e2el", "--save-result",
        "--result-dir", str(result.parent), "--result-filename", result.name, "--temperature",
        "0", "--request-id-prefix", "bench-parity-",
    ]  # fmt: skip


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(what, difference, allowed)."""
    found = [
        (f"mean {m} ms", abs(ours[f"mean_{m}_ms"] - theirs[f"mean_{m}_ms"]), MS) for m in METRICS
    ]
    found += [(f"{t} share", abs(ours[t] / theirs[t] - 1), SHARE) for t in THROUGHPUTS]
    for key in ("completed", "total_input_tokens", "total_output_tokens"):
        found.append((key, abs(ours[key] - theirs[key]), 0))
    return found


@contextmanager
def mock(script: Path) -> Iterator[str]:
    """The server; its URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, str(HERE / "mock_openai.py"), "--port", str(port), "--script",
               str(script)]  # fmt: skip
    with subprocess.Popen(command) as child:
        try:
            wait_for(url, child)
            yield url
        finally:
            child.terminate()


def compare(args: argparse.Namespace, vllm: Vllm, concurrency: int, folder: Path) -> bool:
    """Whether the two agree at ``concurrency``; prints what was found."""
    count = max(32, 6 * concurrency)
    script = folder / f"plans-{concurrency}.json"
    script.write_text(json.dumps(plans(count, concurrency)))
    for attempt in range(1, args.attempts + 1):
        results = []
        clients: list[Callable[[list[str]], None]] = [run_sinterlm, vllm.run]
        for number, client in enumerate(clients):
            result = folder / f"{number}-{concurrency}.json"
            with mock(script) as url:
                client(arguments_of(url, args.tokenizer, concurrency, count, result))
            results.append(json.loads(result.read_text()))
        found = differences(*results)
        agree = all(difference <= allowed for _, difference, allowed in found)
        print(f"concurrency {concurrency}, try {attempt}: {'agree' if agree else 'DIFFER'}")
        for what, difference, allowed in found:
            print(f"  {what:32} {difference:10.5f} (allowed {allowed:g})")
        for key in (*(f"mean_{m}_ms" for m in METRICS), *THROUGHPUTS):
            print(f"  {key:32} {results[0][key]:10.3f} {results[1][key]:10.3f}", flush=True)
        if agree:
            return True
    return False


def main() -> int:
    """Compare at each concurrency."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-python", required=True, help="interpreter with vLLM 0.32")
    parser.add_argument("--tokenizer", required=True, help="Hugging Face folder of a tokenizer")
    parser.add_argument("--concurrency", default="1,8,64")
    parser.add_argument("--attempts", type=int, default=5)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    levels = [int(level) for level in args.concurrency.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        vllm = Vllm(args.vllm_python, Path(folder) / "vllm.log")
        try:
            agreed = [compare(args, vllm, level, Path(folder)) for level in levels]
        finally:
            vllm.child.kill()
    for level, ok in zip(levels, agreed, strict=True):
        print(f"concurrency {level}: {'agree' if ok else 'DIFFER'}")
    return 0 if all(agreed) else 1


if __name__ == "__main__":
    sys.exit(main())
