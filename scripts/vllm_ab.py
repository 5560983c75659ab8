"""Stock vLLM against SinterLM inside it, on a GPU; run with the Python of that vLLM.

    ENV/bin/python scripts/vllm_ab.py TRAINED SHAPE [--sizes 1 8 64 128]

TRAINED is a model whose greedy tokens are compared: ours eagerly, ours with vLLM's graphs, stock.
SHAPE is a folder with a config.json, run with random weights: tokens per second of decode steps at
each batch size. Stock has AITER on, where there is one. Every run is a process of its own. What is
found is the line that begins with ``result:``, a JSON object: vLLM prints lines of its own, at its
end too. Fails where our tokens differ between eager steps and graphs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

ARMS = {
    "ours": {"SINTERLM_VLLM": "require"},
    "stock": {"SINTERLM_VLLM": "off", "VLLM_ROCM_USE_AITER": "1"},
}
NEW_TOKENS = 64
PROMPTS = [[5, 17, 99, 3, 120, 8, 64], [1], [130, 22, 22]]


def main() -> int:
    """0 when our tokens are the same by graphs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trained")
    parser.add_argument("shape")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 8, 64, 128])
    parser.add_argument("--run", help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.run:
        print("result:", json.dumps(RUNS[args.run](args)), flush=True)
        return 0
    found = {arm: told(arm, "tokens") for arm in ARMS}
    eager = told("ours", "eager_tokens")
    facts = {
        "graphs draw what eager steps draw": found["ours"] == eager,
        # Both round where the other does not, so a near tie may fall the other way.
        "tokens are stock's": found["ours"] == found["stock"],
        "tokens/s": {arm: told(arm, "speeds") for arm in ARMS},
    }
    print("result:", json.dumps(facts), flush=True)
    return 0 if found["ours"] == eager else 1


def told(arm: str, run: str) -> Any:
    """What a run of an arm ends with."""
    command = [sys.executable, *sys.argv, "--run", run]
    done = subprocess.run(
        command, env={**os.environ, **ARMS[arm]}, check=True, text=True, stdout=subprocess.PIPE
    )
    return result_of(done.stdout)


def result_of(printed: str) -> Any:
    """What follows ``result:``."""
    (line,) = (text for text in printed.splitlines() if text.startswith("result: "))
    return json.loads(line.removeprefix("result: "))


def open_model(model: str, **options: Any) -> Any:
    """vLLM's LLM."""
    from vllm import LLM

    return LLM(
        model, dtype="bfloat16", max_model_len=256, max_num_seqs=128, skip_tokenizer_init=True,
        **options,
    )  # fmt: skip


def answers(llm: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    """``count`` greedy tokens behind each prompt."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    given = [{"prompt_token_ids": ids} for ids in prompts]
    return [list(a.outputs[0].token_ids) for a in llm.generate(given, params, use_tqdm=False)]


def tokens(args: argparse.Namespace) -> list[list[int]]:
    """Of the trained model, decode by graphs."""
    return answers(open_model(args.trained), PROMPTS, 16)


def eager_tokens(args: argparse.Namespace) -> list[list[int]]:
    """The same without graphs."""
    return answers(open_model(args.trained, enforce_eager=True), PROMPTS, 16)


def speeds(args: argparse.Namespace) -> dict[int, float]:
    """Tokens per second of decode steps, by batch size; the second of two runs."""
    llm, found = open_model(args.shape, load_format="dummy"), {}
    for size in args.sizes:
        prompts = [[i % 100 + 1] * 16 for i in range(size)]
        answers(llm, prompts, NEW_TOKENS)
        began = time.perf_counter()
        answers(llm, prompts, 1)
        first = time.perf_counter() - began
        began = time.perf_counter()
        answers(llm, prompts, NEW_TOKENS)
        decode = time.perf_counter() - began - first
        found[size] = round(size * (NEW_TOKENS - 1) / decode, 1)
    return found


RUNS: dict[str, Any] = {"tokens": tokens, "eager_tokens": eager_tokens, "speeds": speeds}

if __name__ == "__main__":
    sys.exit(main())
