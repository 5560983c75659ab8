"""One tiny model for the tests of benchmarks, and probes that take no time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from scripts.mock_openai import Plan

from sinterlm.artifact.bundle import Bundle
from sinterlm.bench.recording import RecordingModel
from sinterlm.compile import compile_model
from sinterlm.options import CompileOptions
from tests.bench.mock import Mock, running_mock
from tests.conftest import ROOT

#: Two layers, with a tokenizer.
TINY = ROOT / "tests/goldens/models/qwen3-qknorm"


@pytest.fixture(scope="session")
def tiny(test_environment: Path) -> Bundle:
    """The tiny model, compiled."""
    return compile_model(CompileOptions(str(TINY)))


@pytest.fixture
def high_roof(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """Probes find a machine so fast that no run comes near its roof; what they found, in order.

    Each finds something else, so that mixing up two of them changes a result.
    """
    found: list[tuple[float, float]] = []

    def probe(self: RecordingModel, seconds: float = 1.0) -> tuple[float, float]:
        found.append((1e6 + len(found), 1e5 + 10 * len(found)))  # GFLOP/s, GB/s
        return found[-1]

    monkeypatch.setattr(RecordingModel, "probe", probe)
    return found


@pytest.fixture(scope="session")
def mock_server() -> Iterator[Mock]:
    """One stand-in server for all tests; each tells it what to do."""
    with running_mock() as mock:
        yield mock


@pytest.fixture
def mock(mock_server: Mock) -> Mock:
    """The stand-in, with its default plan: three chunks."""
    mock_server.script([Plan()])
    return mock_server
