"""Figures that others published for QwQ-32B on MI300X and H200; see ``data/SOURCES.md``.

Never drawn on an axis with ours: their batch sizes are bursts of ShareGPT prompts, whose output
lengths differ from point to point.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

MODEL = "qwq-32b"
SOURCE = (
    'published by others: "Optimizing QwQ-32B (by Qwen): AMD MI300X vs. NVIDIA H200" (Eliovp, the '
    "Paiton team)"
)
TITLES = {
    "mi300x_stock_vllm_0.7.3": "MI300X, stock vLLM 0.7.3",
    "h200_stock_vllm_0.8.0": "H200, stock vLLM 0.8.0",
    "mi300x_paiton_vllm_0.7.3": "MI300X, Paiton",
}
DEVICES = {
    "mi300x_stock_vllm_0.7.3": "mi300x",
    "h200_stock_vllm_0.8.0": "h200",
    "mi300x_paiton_vllm_0.7.3": "mi300x",
}


@dataclass(frozen=True)
class PublishedRow:
    """One system at one of their batch sizes."""

    system: str  #: a key of TITLES
    batch_size: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float


def published_rows() -> list[PublishedRow]:
    """All of them, in the order of the file."""
    path = Path(__file__).parent / "data" / "qwq32b_throughput.csv"
    with open(path, encoding="utf-8", newline="") as file:
        return [
            PublishedRow(
                row["system"],
                int(row["batch_size"]),
                float(row["request_throughput_req_s"]),
                float(row["output_token_throughput_tok_s"]),
                float(row["total_token_throughput_tok_s"]),
            )
            for row in csv.DictReader(file)
        ]
