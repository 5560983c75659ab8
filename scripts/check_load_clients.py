"""Drives a running server with the load generators of others, unchanged, and reads their results.

    python scripts/check_load_clients.py http://127.0.0.1:8000 MODEL --tokenizer DIR/hf \\
      --vllm VENV/bin/python --aiperf VENV/bin/python

``--vllm`` has vLLM (``sinterlm bench setup vllm``) and checks ``vllm bench serve``; ``--aiperf``
has NVIDIA's aiperf. The tokenizer's folder is one of ``sinterlm bench make-checkpoint``. A client's
own result file must say that every request was answered with every token it asked for, and no
error. Prints one line per check; the exit code is 1 if one fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUM_REQUESTS, NUM_TOKENS = 16, 12


@dataclass(frozen=True)
class Target:
    """The server, and what its tokens are."""

    url: str
    model: str
    tokenizer: str


def vllm_bench_serve(python: str, target: Target, chat: bool) -> None:
    """``vllm bench serve``, which streams."""
    backend, endpoint = (
        ("openai-chat", "/v1/chat/completions") if chat else ("openai", "/v1/completions")
    )
    with tempfile.TemporaryDirectory() as folder:
        run(
            [python, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", backend,
             "--endpoint", endpoint, "--base-url", target.url, "--model", target.model,
             "--tokenizer", target.tokenizer, "--dataset-name", "random", "--random-input-len",
             "24", "--random-output-len", str(NUM_TOKENS), "--num-prompts", str(NUM_REQUESTS),
             "--max-concurrency", "4", "--ignore-eos", "--temperature", "0", "--save-result",
             "--save-detailed", "--result-dir", folder, "--result-filename", "result.json"],
            folder, {**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        result = read_json(Path(folder) / "result.json")
    assert (result["completed"], result["failed"]) == (NUM_REQUESTS, 0), result["errors"]
    assert result["output_lens"] == [NUM_TOKENS] * NUM_REQUESTS, result["output_lens"]
    assert not any(result["errors"]), result["errors"]


def aiperf_profile(python: str, target: Target, kind: str) -> None:
    """``aiperf profile``, streaming; tokens as the server's usage counts them."""
    # Its offline mode looks a folder up as if it were a Hub id; so keep it off the net otherwise.
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        environment.pop(name, None)
    with tempfile.TemporaryDirectory() as folder:
        run(
            [python, "-m", "aiperf", "profile", "--model", target.model, "--url", target.url,
             "--endpoint-type", kind, "--streaming", "--tokenizer", target.tokenizer, "--isl",
             "24", "--osl", str(NUM_TOKENS), "--request-count", str(NUM_REQUESTS),
             "--concurrency", "4", "--extra-inputs", "ignore_eos:true", "--extra-inputs",
             f"min_tokens:{NUM_TOKENS}", "--use-server-token-count", "--ui", "none",
             "--output-artifact-dir", folder],
            folder, environment,
        )  # fmt: skip
        result = read_json(Path(folder) / "profile_export_aiperf.json")
    assert result["is_complete"] and not result["was_cancelled"]
    assert result["request_count"]["avg"] == NUM_REQUESTS, result["request_count"]
    assert result["request_error_rate"]["avg"] == 0, result["error_summary"]
    assert result["error_summary"] == [], result["error_summary"]
    lengths = result["output_sequence_length"]
    assert lengths["min"] == lengths["max"] == NUM_TOKENS, lengths


def run(command: list[str], folder: str, environment: dict[str, str]) -> None:
    """Raises AssertionError with the end of the output when the client fails."""
    done = subprocess.run(
        command, cwd=folder, env=environment, text=True, timeout=600, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stdout[-3000:]}"


def read_json(path: Path) -> dict[str, Any]:
    """A client's result file."""
    assert path.exists(), f"the client wrote no {path.name}"
    return dict(json.loads(path.read_text()))


def checks(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every check that was asked for, and its name."""
    target = Target(args.url, args.model, args.tokenizer)
    if args.vllm:
        yield "vllm bench serve, text", lambda: vllm_bench_serve(args.vllm, target, chat=False)
        yield "vllm bench serve, chat", lambda: vllm_bench_serve(args.vllm, target, chat=True)
    if args.aiperf:
        yield "aiperf, text", lambda: aiperf_profile(args.aiperf, target, "completions")
        yield "aiperf, chat", lambda: aiperf_profile(args.aiperf, target, "chat")


def main() -> int:
    """Run all; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url", help="of the server, without /v1")
    parser.add_argument("model", help="the name it is served under")
    parser.add_argument("--tokenizer", required=True, help="folder of the model's tokenizer")
    parser.add_argument("--vllm", help="a Python that has vLLM")
    parser.add_argument("--aiperf", help="a Python that has aiperf")
    failed = 0
    for name, check in checks(parser.parse_args()):
        try:
            check()
            print(f"ok      {name}")
        except Exception as exc:
            failed += 1
            print(f"FAILED  {name}: {type(exc).__name__}: {exc}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
