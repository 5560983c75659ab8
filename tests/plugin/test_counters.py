"""Counters that one process writes and another shows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest

from sinterlm.plugin import counters


def test_alone() -> None:
    own = counters.Counters(None)
    own.add(1, 7, 500)
    own.add(1, 1, 500)
    assert own.read() == {"steps": 2, "tokens": 8, "nanoseconds": 1000}


def test_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SINTERLM_VLLM_COUNTERS", raising=False)
    registry = CollectorRegistry()
    monkeypatch.setattr(REGISTRY, "register", registry.register)
    counters.share_counters()
    path = os.environ["SINTERLM_VLLM_COUNTERS"]
    monkeypatch.setenv("SINTERLM_VLLM_COUNTERS", path)  # taken back at the end
    counters.share_counters()  # in every process; only the first one makes the file
    code = "from sinterlm.plugin.counters import open_counters; open_counters().add(3, 9, 2**31)"
    subprocess.run([sys.executable, "-c", code], check=True)
    text = generate_latest(registry).decode()
    assert "sinterlm_steps_total 3.0" in text and "sinterlm_tokens_total 9.0" in text
    assert "sinterlm_step_seconds_total 2.147483648" in text
    assert Path(path).exists()
    counters._remove(path, os.getpid() + 1)
    assert Path(path).exists(), "another process does not remove it"
    counters._remove(path, os.getpid())
    assert not Path(path).exists()
