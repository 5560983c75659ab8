"""One op-test library per ISA level this machine has; and of the quantised kernels, those of
AVX-512 emulated by SIMDe where the machine lacks them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from sinterlm.backends.cxx.isa import available_isas, isa_macro
from sinterlm.options import IsaName
from tests.kernels import coded, oplib
from tests.kernels.coded import CodedLib
from tests.kernels.oplib import OpLib
from tests.libraries import BuildLibrary


def _op_library(build: BuildLibrary, isa: IsaName, codes: bool = False) -> OpLib:
    flags = oplib.KV_CODES if codes else ()
    return OpLib(isa, build(oplib.SOURCE.read_text(), isa, flags), codes)


@pytest.fixture(scope="session", params=available_isas())
def ops(request: pytest.FixtureRequest, build_library: BuildLibrary) -> OpLib:
    return _op_library(build_library, request.param)


@pytest.fixture(scope="session", params=available_isas())
def kv8_ops(request: pytest.FixtureRequest, build_library: BuildLibrary) -> OpLib:
    """With KV pages in codes."""
    return _op_library(build_library, request.param, codes=True)


@pytest.fixture(
    scope="session",
    params=[(isa, codes) for isa in available_isas() for codes in (False, True)],
    ids=lambda p: p[0] + ("-kv8" if p[1] else ""),
)
def kv_ops(request: pytest.FixtureRequest, build_library: BuildLibrary) -> OpLib:
    """With KV pages of either kind."""
    return _op_library(build_library, *request.param)


SIMDE = Path("/usr/include/simde/x86/avx512.h")
SHIM = Path(__file__).with_name("simde_avx512.h")
EMULATED: tuple[IsaName, ...] = ("avx512bf16", "avx512")


def _levels() -> list[object]:
    """Levels to test natively, then those to emulate: slow, since they take minutes to build."""
    native = available_isas()
    return [
        *native,
        *(
            pytest.param(f"{isa} emulated", marks=pytest.mark.slow)
            for isa in EMULATED
            if isa not in native
        ),
    ]


@pytest.fixture(scope="session", params=_levels())
def lib(request: pytest.FixtureRequest, build_library: BuildLibrary) -> CodedLib:
    isa, _, is_emulated = request.param.partition(" ")
    source = coded.SOURCE.read_text()
    if not is_emulated:
        return CodedLib(isa, build_library(source, isa, ("-O1",)))
    if not SIMDE.exists() or "avx2" not in available_isas():
        pytest.skip("needs SIMDe's headers (Debian: libsimde-dev) and AVX2")
    flags = ("-O1", f"-D{isa_macro(isa)}=1")
    return CodedLib(isa, build_library(SHIM.read_text() + source, "avx2", flags))
