"""What tests of the GPU target share. All of it runs without a device."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from sinterlm.artifact.memo import Memo
from sinterlm.backends.gpu.devices import DEVICES
from sinterlm.backends.gpu.library import compile_host, join
from sinterlm.backends.gpu.objects import archive, compile_objects
from sinterlm.passes.formats import Scheme
from tests.gpu.host import Machine, build_driver, for_few_rows
from tests.gpu.models import fp8, tiny
from tests.gpu.recording import RecordingDriver


@pytest.fixture(scope="session")
def triton() -> None:
    """Skip where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton: pip install 'sinterlm[gpu]'")


@pytest.fixture(scope="session")
def memo(tmp_path_factory: pytest.TempPathFactory) -> Memo:
    return Memo(tmp_path_factory.mktemp("memo"))


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Hosts by mutation; "" is the real one."""
    return {}


@pytest.fixture(params=["gfx942", *(pytest.param(p, marks=pytest.mark.slow)
                                    for p in ("sm_90", "sm_90:int4", "gfx942:fp8",
                                              "gfx942:fp8-kv", "sm_90:fp8-kv"))])  # fmt: skip
def machine(
    triton: None, request: pytest.FixtureRequest, tmp_path: Path, memo: Memo,
    hosts: dict[str, bytes], monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Machine]:  # fmt: skip
    name, _, stored = request.param.partition(":")
    device = DEVICES[name]
    mutation = getattr(request.node.get_closest_marker("mutation"), "args", ("",))[0]
    if mutation not in hosts:
        out = tmp_path / "host.so"
        compile_host(out, defines={f"SL_MUTATE_{mutation}": "1"} if mutation else None)
        hosts[mutation] = out.read_bytes()
    schemes = {"int4": Scheme(4, act="graph"), "fp8": fp8(name, act="fp8")}
    model = tiny("llama-tied", name, schemes.get(stored), kv_fp8=stored == "fp8-kv")
    table = for_few_rows(model.table)
    objects = compile_objects(table.kernels, device, memo)
    library, weights = tmp_path / "model.so", tmp_path / "weights.bin"
    library.write_bytes(join(hosts[mutation], archive(table.to_text(), objects)))
    weights.write_bytes(model.packed.tobytes())
    driver = RecordingDriver(device, table, [(o.kernel, o.code) for o in objects])
    path = build_driver(tmp_path, device.vendor)
    driver.attach(path)
    monkeypatch.setenv("SINTERLM_GPU_DRIVER", str(path))
    shared = {o.kernel.id: o.facts["shared_bytes"] for o in objects}
    yield Machine(model, table, driver, library, weights, shared)
