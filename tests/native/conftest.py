"""Native test libraries and tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sinterlm.backends.cxx.isa import best_isa
from sinterlm.options import IsaName
from tests.libraries import BuildLibrary
from tests.native.tiny import Tiny, build_tiny

HERE = Path(__file__).parent
Build = Callable[[str, IsaName], Path]
MakeTiny = Callable[[str, str], Tiny]


@pytest.fixture(scope="session")
def build(build_library: BuildLibrary) -> Build:
    """``build("samplelib.cpp", "avx2")`` gives the path of the shared library."""
    return lambda source, isa: build_library((HERE / source).read_text(), isa)


@pytest.fixture(scope="session")
def isa() -> IsaName:
    return best_isa()


@pytest.fixture(scope="session")
def tiny(
    tmp_path_factory: pytest.TempPathFactory, isa: IsaName, build_library: BuildLibrary
) -> MakeTiny:
    """``tiny("gqa5-bias", "bf16")`` gives a bundle, built once."""
    made: dict[tuple[str, str], Tiny] = {}

    def make(name: str, dtype: str) -> Tiny:
        if (name, dtype) not in made:
            folder = tmp_path_factory.mktemp(f"{name}-{dtype}")
            made[name, dtype] = build_tiny(name, dtype, isa, folder, build_library)
        return made[name, dtype]

    return make
