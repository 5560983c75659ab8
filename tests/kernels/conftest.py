"""One op-test library per ISA level this machine has, built once per session."""

from __future__ import annotations

from pathlib import Path

import pytest

from sinterlm.backends.cpu.isa import available_isas
from tests.kernels.coded import CodedLib
from tests.kernels.oplib import OpLib


@pytest.fixture(scope="session", params=available_isas())
def ops(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OpLib:
    return OpLib(request.param, _folder(tmp_path_factory))


@pytest.fixture(scope="session", params=available_isas())
def lib(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CodedLib:
    return CodedLib(request.param, _folder(tmp_path_factory), ("-O1",))


def _folder(factory: pytest.TempPathFactory) -> Path:
    return factory.mktemp("optest")
