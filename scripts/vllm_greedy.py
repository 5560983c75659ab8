"""Greedy answers of the vLLM in this environment; run with that environment's Python.

    ENV/bin/python scripts/vllm_greedy.py MODEL... [--max-tokens N] [--kv-bytes N] < PROMPTS

PROMPTS is a JSON list of texts, or of lists of token ids. The last line printed is a JSON object:
for each model the tokens of every answer, the same once more from the prefix cache, and how far the
second-best token was behind each (logits). With ``SINTERLM_VLLM=require`` it is SinterLM inside
vLLM that answers.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from typing import Any


def main() -> None:
    """Answer every prompt, all at once, with one model after the other."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--kv-bytes", type=int, default=1 << 30)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--distributed-executor-backend", choices=("mp", "ray"))
    args = parser.parse_args()
    prompts = json.load(sys.stdin)
    if not isinstance(prompts[0], str):
        prompts = [{"prompt_token_ids": ids} for ids in prompts]
    print(json.dumps({model: answers(model, prompts, args) for model in args.models}))


def answers(model: str, prompts: list[Any], args: argparse.Namespace) -> dict[str, Any]:
    """What ``model`` says."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model, dtype=args.dtype, max_model_len=args.max_model_len, max_num_seqs=16,
        kv_cache_memory_bytes=args.kv_bytes, enforce_eager=True,
        tensor_parallel_size=args.tensor_parallel_size,
        distributed_executor_backend=args.distributed_executor_backend,
        skip_tokenizer_init=not isinstance(prompts[0], str),
    )  # fmt: skip
    params = SamplingParams(
        temperature=0, max_tokens=args.max_tokens, ignore_eos=True, logprobs=2,
        detokenize=isinstance(prompts[0], str),
    )  # fmt: skip
    first, again = llm.generate(prompts, params), llm.generate(prompts, params)
    del llm
    gc.collect()
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in first],
        "again": [list(output.outputs[0].token_ids) for output in again],
        "margins": [[_margin(near) for near in output.outputs[0].logprobs] for output in first],
    }


def _margin(near: dict[int, Any]) -> float:
    best, second = sorted((entry.logprob for entry in near.values()), reverse=True)[:2]
    return float(best - second)


if __name__ == "__main__":
    main()
