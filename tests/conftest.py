"""What every test shares: a cache of its own, no network, and hypothesis without a clock."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from sinterlm.artifact.cache import Cache
from sinterlm.artifact.housekeeping import prune
from tests.libraries import BuildLibrary, build_into

ROOT = Path(__file__).resolve().parent.parent

settings.register_profile(
    "default",
    derandomize=True,  # the same examples on every machine; `--hypothesis-profile=search` hunts
    deadline=None,  # two busy cores say nothing about a test
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile("default")


@pytest.fixture(scope="session", autouse=True)
def test_environment(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """One cache folder for all tests, so that a model is compiled once; returns that folder.

    It lives in pytest's own cache: processes of a parallel run share it, and a second run compiles
    only what changed. What older sources left in it is removed. Variables of the person who runs
    the tests do not reach them.
    """
    own = getattr(request.config, "cache", None)
    cache = tmp_path_factory.mktemp("cache") if own is None else Path(own.mkdir("sinterlm-e2e"))
    prune(Cache.at(cache), older_than_days=3, max_bytes=2 << 30)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("SINTERLM_")]:
            patch.delenv(name)
        patch.setenv("SINTERLM_CACHE_DIR", str(cache))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield cache


@pytest.fixture(scope="session")
def build_library(test_environment: Path) -> BuildLibrary:
    """``build_library(source, "avx2", flags)`` gives the path of the shared library."""
    return partial(build_into, Cache.at(test_environment))
