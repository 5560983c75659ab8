"""Equal requests at once through vLLM's ``LLM`` class; run by offline_against_vllm.py with the
Python of vLLM's environment.

For each batch size one JSON line: total tokens/s, and the median time between two steps while every
sequence decodes, in seconds. Prompts are random token ids, outputs have the length asked for.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median

import numpy as np
from vllm import LLM, SamplingParams


def main() -> None:
    """Load once, warm up, measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--batch-sizes", type=int, nargs="+", required=True)
    parser.add_argument("--input-len", type=int, required=True)
    parser.add_argument("--output-len", type=int, required=True)
    args = parser.parse_args()
    llm = LLM(
        args.model,
        dtype="bfloat16",
        max_num_seqs=max(args.batch_sizes),
        max_model_len=args.input_len + args.output_len + 64,
        enable_prefix_caching=False,
    )
    rng = np.random.default_rng(0)
    for count in [args.batch_sizes[0], *args.batch_sizes]:  # the first one is not counted
        prompts = rng.integers(0, 40_000, (count, args.input_len)).tolist()
        result = measure(llm, prompts, args.output_len)
        print(json.dumps({"batch_size": count, **result}), flush=True)


def measure(llm: LLM, prompts: list[list[int]], output_len: int) -> dict[str, float]:
    """Run ``prompts`` to the end."""
    engine = llm.llm_engine
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    start = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.add_request(f"{start}-{i}", {"prompt_token_ids": prompt}, params)
    drawn: dict[str, int] = {}
    gaps: list[float] = []
    last = None
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        if last is not None and outputs:
            gaps.append(now - last)
        for output in outputs:
            drawn[output.request_id] = len(output.outputs[0].token_ids)
        last = now if len(drawn) == len(prompts) and outputs else last
    seconds = time.perf_counter() - start
    assert len(drawn) == len(prompts) and set(drawn.values()) == {output_len}, drawn
    total = sum(map(len, prompts)) + output_len * len(prompts)
    return {"total_tokens_per_s": total / seconds, "median_decode_step_s": median(gaps)}


if __name__ == "__main__":
    main()
