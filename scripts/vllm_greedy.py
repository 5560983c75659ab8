"""Greedy answers of the vLLM in this environment, as JSON; run with that environment's Python.

    ENV/bin/python scripts/vllm_greedy.py MODEL [--max-tokens N] [--kv-bytes N] PROMPT...

With ``SINTERLM_VLLM=require`` it is SinterLM inside vLLM that answers.
"""

from __future__ import annotations

import argparse
import json


def main() -> None:
    """Answer every prompt, all at once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--kv-bytes", type=int, default=1 << 30)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    from vllm import LLM, SamplingParams

    llm = LLM(
        args.model, dtype=args.dtype, max_model_len=args.max_model_len, max_num_seqs=16,
        kv_cache_memory_bytes=args.kv_bytes, enforce_eager=True,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens, ignore_eos=True)
    outputs = llm.generate(args.prompts, params)
    again = llm.generate(args.prompts, params)  # from the prefix cache, where there is one
    print(json.dumps([[list(o.outputs[0].token_ids) for o in run] for run in (outputs, again)]))


if __name__ == "__main__":
    main()
