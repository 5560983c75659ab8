"""Native test libraries, each compiled once per session and ISA level."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sinterlm.backends.cpu.isa import best_isa
from sinterlm.backends.cpu.toolchain import compile_library
from sinterlm.options import IsaName
from tests.native.tiny import Tiny, build_tiny

HERE = Path(__file__).parent
Build = Callable[[str, IsaName], Path]
MakeTiny = Callable[[str, str], Tiny]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """``build("samplelib.cpp", "avx2")`` gives the path of the shared library."""
    folder = tmp_path_factory.mktemp("native")
    made: dict[tuple[str, IsaName], Path] = {}

    def build_once(source: str, isa: IsaName) -> Path:
        key = source, isa
        if key not in made:
            made[key] = folder / f"{Path(source).stem}-{isa}.so"
            compile_library((HERE / source).read_text(), made[key], isa)
        return made[key]

    return build_once


@pytest.fixture(scope="session")
def isa() -> IsaName:
    return best_isa()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, isa: IsaName) -> MakeTiny:
    """``tiny("gqa5-bias", "bf16")`` gives a bundle, built once."""
    made: dict[tuple[str, str], Tiny] = {}

    def make(name: str, dtype: str) -> Tiny:
        if (name, dtype) not in made:
            folder = tmp_path_factory.mktemp(f"{name}-{dtype}")
            made[name, dtype] = build_tiny(name, dtype, isa, folder)
        return made[name, dtype]

    return make
