"""Requests drawn from the server's own OpenAPI document, and answers held against it.

Schemathesis draws them, as its command line does for anybody: every answer must come in time, with
a status that the document declares, and be of the declared type and shape.
"""

from __future__ import annotations

import collections
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.fuzz.narrowed import FORMS, narrowed
from tests.serve.load.process import ServerProcess, running

pytest.importorskip("schemathesis", reason="schemathesis is not installed: make test-all does")

pytestmark = pytest.mark.slow

CANARY = {"prompt": "The capital of France is", "max_tokens": 6, "temperature": 0,
          "return_token_ids": True}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running("--max-model-len", "96", "--log-level", "error") as process:
        before = process.post("/v1/completions", CANARY)[1]["choices"][0]["token_ids"]
        yield process
        assert process.get("/health")[0] == 200
        process.wait_until_idle()
        assert process.post("/v1/completions", CANARY)[1]["choices"][0]["token_ids"] == before
        assert process.stop() == 0


def drive(server: ServerProcess, folder: Path, document: Any, *flags: str) -> collections.Counter:
    """Run schemathesis to the end; how many answers had each status. Fails with what it finds."""
    (folder / "openapi.json").write_text(json.dumps(document))
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", *flags,
         "--url", f"http://127.0.0.1:{server.port}", "--request-timeout", "60", "--workers", "4",
         # The document declares types; what else a value must be, the server says with a 400.
         "--exclude-checks", "positive_data_acceptance",
         "--continue-on-failure", "--generation-deterministic", "--no-color",
         "--report", "ndjson", "--report-ndjson-path", "report.ndjson"],
        capture_output=True, text=True, timeout=600, check=False, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    return collections.Counter(statuses(folder / "report.ndjson"))


def statuses(report: Path) -> Iterator[int]:
    for line in report.read_text().splitlines():
        scenario = json.loads(line).get("ScenarioFinished", {})
        for exchange in scenario.get("recorder", {}).get("interactions", {}).values():
            yield exchange["response"]["status_code"]


def test_any_request(server: ServerProcess, tmp_path: Path) -> None:
    """Every operation, values of the declared types and of others."""
    document = json.loads(server.get("/openapi.json")[1])
    seen = drive(server, tmp_path, document, "--phases", "coverage,fuzzing", "--max-examples", "10")
    assert seen.total() > 1000 and max(seen) < 500


@pytest.mark.parametrize("form", FORMS)
def test_requests_that_are_answered(server: ServerProcess, tmp_path: Path, form: str) -> None:
    """Values within their ranges: many get as far as the engine."""
    document = narrowed(json.loads(server.get("/openapi.json")[1]), form)
    seen = drive(
        server, tmp_path, document,
        "--phases", "fuzzing", "--mode", "positive", "--max-examples", "15",
    )  # fmt: skip
    assert seen[200] > 15 and max(seen) < 500, seen
