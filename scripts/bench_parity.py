"""Drives `sinterlm bench serve` and `vllm bench serve` against one server, and compares them.

    python scripts/bench_parity.py --vllm "VENV/bin/vllm"    (vLLM 0.32; make bench-parity)

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


def measure(client: list[str], url: str, tokenizer: str, concurrency: int, count: int,
            folder: Path) -> dict[str, Any]:  # fmt: skip
    """One run of one client; its result file. Warm-ups open every connection beforehand."""
    name = f"{Path(client[0]).name}-{concurrency}.json"
    command = [
        *client, "bench", "serve", "--backend", "openai", "--base-url", url, "--model", tokenizer,
        "--tokenizer", tokenizer, "--dataset-name", "random", "--random-input-len", "16",
        "--random-output-len", "32", "--num-prompts", str(count), "--max-concurrency",
        str(concurrency), "--num-warmups", str(concurrency), "--percentile-metrics",
        "ttft,tpot,itl,e2el", "--save-result", "--result-dir", str(folder), "--result-filename",
        name, "--temperature", "0", "--request-id-prefix", "bench-parity-",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(
            f"{shlex.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return dict(json.loads((folder / name).read_text()))


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(what, difference, allowed)."""
    found = [
        (f"mean {m} ms", abs(ours[f"mean_{m}_ms"] - theirs[f"mean_{m}_ms"]), MS) for m in METRICS
    ]
    found += [(f"{t} share", abs(ours[t] / theirs[t] - 1), SHARE) for t in THROUGHPUTS]
    for key in ("completed", "total_input_tokens", "total_output_tokens"):
        found.append((key, abs(ours[key] - theirs[key]), 0))
    return found


def compare(args: argparse.Namespace, concurrency: int, folder: Path) -> bool:
    """Whether the two agree at ``concurrency``; prints what was found."""
    count = max(32, 6 * concurrency)
    script = folder / f"plans-{concurrency}.json"
    script.write_text(json.dumps(plans(count, concurrency)))
    for attempt in range(1, args.attempts + 1):
        results = []
        for client in ([sys.executable, "-m", "sinterlm"], shlex.split(args.vllm)):
            port = free_port()
            url = f"http://127.0.0.1:{port}"
            server = [sys.executable, str(HERE / "mock_openai.py"), "--port", str(port),
                      "--script", str(script)]  # fmt: skip
            with subprocess.Popen(server) as child:
                try:
                    wait_for(url, child)
                    results.append(measure(client, url, args.tokenizer, concurrency, count, folder))
                finally:
                    child.terminate()
        found = differences(*results)
        agree = all(difference <= allowed for _, difference, allowed in found)
        print(f"concurrency {concurrency}, try {attempt}: {'agree' if agree else 'DIFFER'}")
        for what, difference, allowed in found:
            print(f"  {what:32} {difference:10.5f} (allowed {allowed:g})")
        for key in (*(f"mean_{m}_ms" for m in METRICS), *THROUGHPUTS):
            print(f"  {key:32} {results[0][key]:10.3f} {results[1][key]:10.3f}")
        if agree:
            return True
    return False


def main() -> int:
    """Compare at each concurrency."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", required=True, help="command that starts vLLM's CLI")
    parser.add_argument("--tokenizer", required=True, help="Hugging Face folder of a tokenizer")
    parser.add_argument("--concurrency", default="1,8,64")
    parser.add_argument("--attempts", type=int, default=3)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        levels = [int(level) for level in args.concurrency.split(",")]
        return 0 if all([compare(args, level, Path(folder)) for level in levels]) else 1


if __name__ == "__main__":
    sys.exit(main())
