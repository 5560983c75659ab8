"""The result file of a serving benchmark: vLLM's keys, so that its tools read ours."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from sinterlm.bench.raw import RawRun, write_whole
from sinterlm.bench.serve_stats import ServeStats


def result_json(raw: RawRun, stats: ServeStats) -> dict[str, Any]:
    """Configuration and statistics; null where there is no data."""
    facts = raw.run.facts
    rate = raw.run.request_rate
    return {
        "date": datetime.fromisoformat(raw.run.started_at).strftime("%Y%m%d-%H%M%S"),
        "backend": facts.get("backend"),
        "label": facts.get("label"),
        "model_id": facts.get("model"),
        "tokenizer_id": facts.get("tokenizer"),
        "num_prompts": facts.get("num_prompts"),
        "request_rate": "inf" if rate is None else rate,
        "burstiness": facts.get("burstiness"),
        "max_concurrency": raw.run.max_concurrency,
        "is_complete": raw.run.is_complete,
        **stats.to_json(),
    }


def save_result(folder: Path, name: str | None, result: dict[str, Any]) -> Path:
    """Write ``result`` under vLLM's usual name, or ``name``. Raises as ``write_whole`` does."""
    limit = result["max_concurrency"]
    seats = "" if limit is None else f"-concurrency{limit}"
    model = str(result["model_id"]).rstrip("/").split("/")[-1]
    label = result["label"] or result["backend"]
    usual = f"{label}-{result['request_rate']}qps{seats}-{model}-{result['date']}.json"
    path = folder / (name or usual)
    write_whole(path, json.dumps(result))
    return path
