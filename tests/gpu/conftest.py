"""What tests of the GPU target share. All of it runs without a device."""

from __future__ import annotations

import importlib.util

import pytest


@pytest.fixture(scope="session")
def triton() -> None:
    """Skip where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton: pip install 'sinterlm[gpu]'")
