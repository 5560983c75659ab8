"""Regenerates tests/bench/vllm_metrics.json: vLLM's own statistics of made-up request records.

VLLM_PYTHON scripts/vllm_metrics.py        (an environment with vLLM 0.32)
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

GOLDENS = Path(__file__).resolve().parents[1] / "tests/bench/vllm_metrics.json"
PERCENTILES = (50.0, 90.0, 99.0)
GOODPUT = {"ttft": 120.0, "tpot": 30.0, "e2el": 900.0}
DURATION_S = 6.5


def records() -> list[dict[str, Any]]:
    """Sixty requests: single tokens, several tokens in a chunk, failures, counts by text alone."""
    draw = random.Random(11)
    made = []
    for i in range(60):
        gaps = [draw.uniform(0.005, 0.05) for _ in range(draw.choice([0, 1, 7, 20, 40]))]
        chunks = len(gaps) + 1
        made.append(
            {
                "start": draw.uniform(0.0, 4.0),
                "ttft": draw.uniform(0.01, 0.3),
                "gaps": gaps,
                "tokens": chunks * (3 if i % 7 == 0 else 1),
                "prompt_len": draw.randint(1, 300),
                "fails": i % 11 == 5,
            }
        )
    return made


def main() -> None:
    """Let vLLM compute them and write the file."""
    from vllm import __version__
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
    from vllm.benchmarks.serve import calculate_metrics

    outputs = [
        RequestFuncOutput(
            success=not r["fails"],
            latency=r["ttft"] + sum(r["gaps"]),
            output_tokens=r["tokens"],
            ttft=r["ttft"],
            itl=r["gaps"],
            prompt_len=r["prompt_len"],
            start_time=r["start"],
            error="made to fail" if r["fails"] else "",
        )
        for r in records()
    ]
    metrics, _ = calculate_metrics([], outputs, DURATION_S, None, list(PERCENTILES), GOODPUT)
    found: dict[str, Any] = {"vllm": __version__}
    for name, value in vars(metrics).items():
        if name.startswith("percentiles_"):
            for p, one in value:
                found[f"p{p:g}_{name.removeprefix('percentiles_')}"] = float(one)
        else:
            found[name] = float(value)
    GOLDENS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
