"""Regenerates tests/bench/vllm_datasets.json: what vLLM's own datasets draw, as digests.

sinterlm bench make-checkpoint smollm2 --output DIR --formats safetensors
VLLM_PYTHON scripts/vllm_datasets.py DIR/hf        (an environment with vLLM 0.32)
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

GOLDENS = Path(__file__).resolve().parents[1] / "tests/bench/vllm_datasets.json"

#: (seed, number, shape) of random prompts.
RANDOM: list[tuple[int, int, dict[str, Any]]] = [
    (0, 8, {"input_len": 128, "output_len": 64}),
    (7, 6, {"input_len": 33, "output_len": 9, "range_ratio": 0.5, "prefix_len": 11}),
    (3, 5, {"input_len": 64, "output_len": 16, "range_ratio": {"input": 0.2, "output": 0.0}}),
]
PREFIX: list[tuple[int, int, dict[str, Any]]] = [
    (5, 6, {"prefix_len": 24, "suffix_len": 17, "num_prefixes": 2, "output_len": 12}),
]
ARRIVALS: list[dict[str, Any]] = [
    {"seed": 1, "request_rate": 40.0, "burstiness": 1.0},
    {"seed": 2, "request_rate": 40.0, "burstiness": 0.3},
    {"seed": 3, "request_rate": float("inf"), "burstiness": 2.0,
     "ramp": ["exponential", 20, 80]},
]  # fmt: skip


def sharegpt() -> list[dict[str, Any]]:
    """A small file of ShareGPT's form, with conversations that must be left out."""
    entries: list[dict[str, Any]] = []
    for i in range(12):
        words = " ".join(f"word{i}-{j}" for j in range(1 if i == 3 else 5 + i))
        answer = "no" if i == 5 else f"answer number {i} " * (i + 1)
        turns = [{"from": "human", "value": words}, {"from": "gpt", "value": answer}]
        entries.append({"id": str(i), "conversations": turns[: 1 if i == 7 else 2]})
    return entries


def digest(prompt: str) -> str:
    """First 16 hex digits of the SHA-256."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def rows(requests: list[Any]) -> list[list[Any]]:
    """What is compared of each request."""
    return [[digest(r.prompt), r.prompt_len, r.expected_output_len] for r in requests]


def main() -> None:
    """Draw with vLLM and write the file."""
    import asyncio
    import tempfile
    import time

    import numpy as np
    from transformers import AutoTokenizer
    from vllm import __version__
    from vllm.benchmarks import serve
    from vllm.benchmarks.datasets.datasets import (
        PrefixRepetitionRandomDataset,
        RandomDataset,
        ShareGPTDataset,
    )

    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    found: dict[str, Any] = {"vllm": __version__, "random": [], "prefix": [], "arrivals": []}
    for seed, count, shape in RANDOM:
        drawn = RandomDataset(random_seed=seed).sample(tokenizer, count, **shape)
        found["random"].append(rows(drawn))
    for seed, count, shape in PREFIX:
        drawn = PrefixRepetitionRandomDataset(random_seed=seed).sample(tokenizer, count, **shape)
        found["prefix"].append(rows(drawn))
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(sharegpt(), file)
        file.flush()
        dataset = ShareGPTDataset(dataset_path=file.name, random_seed=4)
        found["sharegpt"] = rows(dataset.sample(tokenizer, 14))

    async def arrivals(how: dict[str, Any]) -> list[float]:
        """Seconds at which vLLM means to send; its clock is frozen, its sleeps are noted."""
        slept: list[float] = []

        async def sleep(seconds: float) -> None:
            slept.append(seconds)

        real_sleep, real_time = asyncio.sleep, time.time
        asyncio.sleep, time.time = sleep, lambda: 0.0  # type: ignore[assignment]
        try:
            np.random.seed(how["seed"])
            ramp = how.get("ramp") or [None, None, None]
            empty = [serve.SampleRequest(prompt="", prompt_len=1)] * 10
            async for _ in serve.get_request(empty, how["request_rate"], how["burstiness"], *ramp):
                pass
        finally:
            asyncio.sleep, time.time = real_sleep, real_time
        return slept

    for how in ARRIVALS:
        found["arrivals"].append(asyncio.run(arrivals(how)))
    GOLDENS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
