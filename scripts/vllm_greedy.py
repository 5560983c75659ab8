"""Greedy answers of the vLLM in this environment; run with that environment's Python.

    ENV/bin/python scripts/vllm_greedy.py MODEL... [--max-tokens N] [--kv-bytes N] < PROMPTS
    ENV/bin/python scripts/vllm_greedy.py MODEL --forced JSON --scores FILE.npy < PROMPTS

PROMPTS is a JSON list of texts, or of lists of token ids. The last line printed is a JSON object:
for each model the tokens of every answer, the same once more from the prefix cache, and how far the
second-best token was behind each (logits). With ``SINTERLM_VLLM=require`` it is SinterLM inside
vLLM that answers. With ``--forced`` PROMPTS are token ids and JSON is a list of as many lists of
them, which are fed behind the prompts: FILE.npy gets the log-probabilities [tokens forced, V],
fp32, that vLLM's ``prompt_logprobs`` has for each.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


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
    parser.add_argument("--forced", type=json.loads)
    parser.add_argument("--scores", type=Path)
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
        max_logprobs=-1 if args.forced else 20,
    )  # fmt: skip
    params = SamplingParams(
        temperature=0, max_tokens=args.max_tokens, ignore_eos=True, logprobs=2,
        detokenize=isinstance(prompts[0], str),
    )  # fmt: skip
    first, again = llm.generate(prompts, params), llm.generate(prompts, params)
    if args.forced:
        rows = [forced_rows(llm, *pair) for pair in zip(prompts, args.forced, strict=True)]
        np.save(args.scores, np.concatenate(rows))
    del llm
    gc.collect()
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in first],
        "again": [list(output.outputs[0].token_ids) for output in again],
        "margins": [[_margin(near) for near in output.outputs[0].logprobs] for output in first],
    }


def forced_rows(llm: Any, prompt: dict[str, list[int]], forced: list[int]) -> Any:
    """What precedes each token of ``forced`` behind ``prompt``: log-probabilities [len, V]."""
    from vllm import SamplingParams

    ids = [*prompt["prompt_token_ids"], *forced]
    params = SamplingParams(
        temperature=0, max_tokens=1, prompt_logprobs=-1, flat_logprobs=True, detokenize=False
    )
    (output,) = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
    told = output.prompt_logprobs
    rows = []
    for at in range(len(ids) - len(forced), len(ids)):
        span = slice(told.start_indices[at], told.end_indices[at])
        row = np.full(max(told.token_ids[span]) + 1, np.nan, np.float32)
        row[told.token_ids[span]] = told.logprobs[span]
        rows.append(row)
    return np.stack(rows)


def _margin(near: dict[int, Any]) -> float:
    best, second = sorted((entry.logprob for entry in near.values()), reverse=True)[:2]
    return float(best - second)


if __name__ == "__main__":
    main()
