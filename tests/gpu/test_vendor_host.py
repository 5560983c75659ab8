"""The host with a vendor's GEMM, on a driver and a GEMM library of no device: what it makes when a
model is opened, what a step calls, and what a graph holds."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from sinterlm import LLM, SamplingParams, cli
from sinterlm.artifact.memo import Memo
from sinterlm.backends.gpu.devices import DEVICES
from sinterlm.backends.gpu.library import archive_of, compile_host, join
from sinterlm.backends.gpu.objects import archive, compile_objects, read_archive
from sinterlm.backends.gpu.simulator import Part, Simulator
from sinterlm.backends.gpu.vendor import WORKSPACE_BYTES
from sinterlm.compile import compile_model
from sinterlm.errors import BundleError, ResourceError, RuntimeFault, UsageError
from sinterlm.options import CompileOptions
from sinterlm.runtime.batch import RowSampling, StepBatch
from sinterlm.runtime.device_probe import device_memory
from sinterlm.runtime.model import Model
from sinterlm.runtime.opening import StepSizes
from tests.conftest import ROOT
from tests.gpu.host import Machine, build_driver, build_gemm, for_few_rows, steps_of
from tests.gpu.models import tiny
from tests.gpu.recording import Launched, RecordingDriver
from tests.gpu.recording_gemm import EXECUTION, NO_MEMORY, NOT_SUPPORTED, RecordingGemm
from tests.gpu.test_borrowed import Caller

pytestmark = pytest.mark.usefixtures("triton")

TRAINED = ROOT / "tests/assets/tiny-llama"
SIZES = {"max_tokens": 300, "max_seqs": 256, "max_sample_rows": 256, "max_model_len": 320,
         "num_slots": 256}  # fmt: skip


def nothing(launched: Launched) -> None:
    """What a launch does where only the calls are looked at."""


@dataclass
class VendorMachine(Machine):
    """With the library beside the driver."""

    gemm: RecordingGemm

    def open(self, **sizes: int) -> Model:
        return super().open(**{**SIZES, **sizes})


@pytest.fixture(params=["gfx942", pytest.param("sm_90", marks=pytest.mark.slow)])
def machine(
    request: pytest.FixtureRequest, tmp_path: Path, memo: Memo, hosts: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[VendorMachine]:  # fmt: skip
    device = DEVICES[request.param]
    mutation = getattr(request.node.get_closest_marker("mutation"), "args", ("",))[0]
    if mutation not in hosts:
        out = tmp_path / "host.so"
        compile_host(out, defines={f"SL_MUTATE_{mutation}": "1"} if mutation else None)
        hosts[mutation] = out.read_bytes()
    model = tiny("llama-tied", device.name, order="pitched")
    table = for_few_rows(model.table)
    objects = compile_objects(table.own_kernels, device, memo)
    library, weights = tmp_path / "model.so", tmp_path / "weights.bin"
    packed = archive(table.to_text(), objects)
    assert read_archive(packed)[0] == table
    library.write_bytes(join(hosts[mutation], packed))
    weights.write_bytes(model.packed.tobytes())
    driver = RecordingDriver(device, table, [(o.kernel, o.code) for o in objects])
    path = build_driver(tmp_path, device.vendor)
    driver.attach(path)
    monkeypatch.setenv("SINTERLM_GPU_DRIVER", str(path))
    folder = tmp_path / 'a "fast" library'
    folder.mkdir()
    gemm, path = RecordingGemm(driver, SIZES["max_tokens"]), build_gemm(folder, device.vendor)
    gemm.attach(path)
    monkeypatch.setenv("SINTERLM_VENDOR_GEMM", str(path))
    yield VendorMachine(model, table, driver, library, weights, {}, gemm)


def decodes(position: int) -> StepBatch:
    """A decode step of 256 sequences, a page of each; all are drawn."""
    every = np.arange(256, dtype=np.int32)
    return StepBatch(
        token_ids=np.full(256, 5, np.int32), positions=np.full(256, position, np.int32),
        query_start=np.arange(257, dtype=np.int32), context_lens=np.full(256, position + 1,
        np.int32), page_table=every[:, None].copy(), sample_rows=every,
        sampling=(RowSampling(position=position + 1),) * 256, slots=every,
    )  # fmt: skip


def test_a_generation_is_the_simulators(machine: VendorMachine) -> None:
    """A prompt of 270 tokens beside another by the library, then decode by our own kernels: the
    simulator's bits."""
    simulator = Simulator(machine.table, machine.tiny.packed, machine.tiny.graph.config.rope,
                          max_tokens=300, max_len=320, page_tokens=128)  # fmt: skip
    gemm, driver = machine.gemm, machine.driver
    shapes = sum(kernel.is_vendor for kernel in machine.table.kernels)
    text = np.random.default_rng(0).integers(0, 150, 270).tolist()
    with machine.open() as model:
        told = model.describe()["vendor_gemm"]
        assert "libhipblaslt" in told or "libcublasLt" in told
        assert '/a "fast" library/' in told
        assert {a.a.columns for a in gemm.algorithms.values()} == {256, 300}, "300 tokens at most"
        assert len(gemm.algorithms) == gemm.calls.count("heuristic") == 2 * shapes
        model.alloc_kv(16, 128)
        before = len(gemm.calls)
        steps_of(model, simulator, [(0, 0, text), (1, 0, [1])])
        layers = machine.tiny.graph.config.num_layers
        assert gemm.calls[before:] == ["matmul"] * (4 * layers)
        assert gemm.rows == [300] * (4 * layers)
        for i in range(2):
            steps_of(model, simulator, [(0, 270 + i, [-1]), (1, 1 + i, [-1])])
        assert len(gemm.calls) == before + 4 * layers, "few rows are ours"
    assert driver.faults == []
    assert gemm.handles == {} and driver.memory == {}, "something was kept"


def test_a_graph_holds_the_products(machine: VendorMachine) -> None:
    """Decode of 256 sequences: eagerly, then captured; nothing but products is asked for."""
    driver, gemm = machine.driver, machine.gemm
    driver.run, driver.poison = nothing, 0
    layers = machine.tiny.graph.config.num_layers
    with machine.open() as model:
        model.alloc_kv(256, 16)
        ready = len(gemm.calls)
        allocations = driver.calls.count("allocate")
        for i in range(3):
            model.step(decodes(i))
        assert model.describe()["graph_launches"] == 2
        assert gemm.calls[ready:] == ["matmul"] * (8 * layers)  # eagerly, and while capturing
        assert driver.calls.count("allocate") == allocations
        many = machine.table.launches_of({"T": 256, "R": 256, "S": 256, "N": 0}, True)
        run = [launched.kernel.name for launched in driver.trace]
        assert run[-2 * len(many) :] == [kernel.name for _, kernel in many] * 2
    assert driver.faults == []


def test_every_algorithm_has_run_before_the_first_step(machine: VendorMachine) -> None:
    """A library loads code when it is first needed, which a capture does not allow."""
    machine.driver.run = nothing
    with machine.open():
        assert all(algorithm.is_loaded for algorithm in machine.gemm.algorithms.values())
    assert machine.gemm.rows == [] and machine.driver.faults == []


@pytest.mark.slow
def test_a_prompt_captured_by_the_caller(machine: VendorMachine) -> None:
    """Without having been run before, as it lives inside another engine; the replay gives the
    simulator's bits."""
    simulator = Simulator(machine.table, machine.tiny.packed, machine.tiny.graph.config.rope,
                          max_tokens=300, max_len=320, num_pages=24)  # fmt: skip
    caller, graph, hidden = _captured_prompt(machine)
    with caller.model:
        machine.driver.on_graph_launch(graph, caller.stream)
        want = simulator.step(Part(list(range(17)), 0, [3] * 270), hidden=True)
        found = caller.read(hidden, np.uint16, 270, caller.hidden_size)
        assert np.array_equal(found, want.hidden)
    assert machine.driver.faults == []


def _captured_prompt(machine: VendorMachine) -> tuple[Caller, int, int]:
    """A caller, the graph of its step of 270 tokens, and where the graph leaves hidden states."""
    sizes = StepSizes(max_tokens=300, max_seqs=8, max_sample_rows=8, max_model_len=320)
    caller = Caller(machine, pages=24, sizes=sizes)
    caller.bind()
    hidden = caller.alloc(2 * 300 * caller.hidden_size)
    step, ready = caller.step(_prompt(270, 16)), len(machine.gemm.calls)
    machine.driver.on_capture_begin(caller.stream, 1)
    caller.model.enqueue(step, caller.stream, hidden, caller.hidden_size)
    assert set(machine.gemm.calls[ready:]) == {"matmul"}
    graph = machine.driver._handle(machine.driver.capturing.pop(caller.stream))
    return caller, graph, hidden


@pytest.mark.parametrize(
    ("mutation", "named"),
    [
        pytest.param(name, named, marks=pytest.mark.mutation(name))
        for name, named in (
            ("GEMM_STREAM", "no stream"),
            ("GEMM_SWAPPED", "is at .* and was at|aligned|no memory"),
            ("GEMM_WORKSPACE", "bytes of workspace"),
            ("GEMM_LATE", "while a stream is being captured"),
            ("GEMM_PITCH", "no matrix of the table"),
            ("GEMM_COLD", "its code is loaded"),
        )
    ],
)
@pytest.mark.slow
def test_planted_faults_are_seen(machine: VendorMachine, mutation: str, named: str) -> None:
    """A host that is broken on purpose: driver or library refuse a call."""
    machine.driver.run, machine.driver.poison = nothing, 0
    with contextlib.suppress(RuntimeFault, BundleError):
        if mutation == "GEMM_COLD":
            _captured_prompt(machine)
        with machine.open() as model:
            model.alloc_kv(256, 16)
            for i in range(3):
                model.step(decodes(i))
    faults = machine.driver.faults
    assert faults and re.search(named, faults[0]), faults


def test_memory_counts_sums_and_workspace(machine: VendorMachine) -> None:
    sizes = {k: v for k, v in SIZES.items() if k != "num_slots"}
    told = device_memory(machine.library, **sizes)
    few = device_memory(machine.library, **{**sizes, "max_tokens": 256})
    buffers = {b.name: b for b in machine.table.buffers}
    assert buffers["vendor_workspace"].nbytes == WORKSPACE_BYTES < told.workspace
    per_token = machine.table.arena_bytes("T")
    assert per_token >= buffers["sums"].offset + buffers["sums"].nbytes
    assert told.workspace - few.workspace >= 44 * per_token
    with machine.open(num_slots=0) as model:
        assert model.describe()["workspace_bytes"] == told.workspace


def test_what_is_wrong_is_said(machine: VendorMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.driver.run = nothing
    name = "hipBLASLt" if machine.driver.device.vendor == "hip" else "cuBLASLt"
    machine.gemm.finds_none = True
    with pytest.raises(BundleError, match=f"{name} has no algorithm for 256 rows of .* without "
                                          "--vendor-gemm"):  # fmt: skip
        machine.open()
    machine.gemm.finds_none = False
    machine.gemm.needed = WORKSPACE_BYTES + 1
    with pytest.raises(BundleError, match="has no algorithm"):
        machine.open()
    machine.gemm.needed = 0
    machine.gemm.fails = {"heuristic": NOT_SUPPORTED}
    with pytest.raises(BundleError, match="has no algorithm"):
        machine.open()
    machine.gemm.fails, code = {"create": NO_MEMORY}, machine.gemm.code(NO_MEMORY)
    with pytest.raises(ResourceError, match=rf"{name} of .*: error {code} while opening it"):
        machine.open()
    machine.gemm.fails = {}
    with machine.open() as model:
        model.alloc_kv(256, 16)
        machine.gemm.fails, code = {"matmul": EXECUTION}, machine.gemm.code(EXECUTION)
        with pytest.raises(RuntimeFault, match=rf"{name} of .*: error {code} while multiplying"):
            model.step(decodes(0))
    machine.gemm.fails = {}
    monkeypatch.setenv("SINTERLM_VENDOR_GEMM", "/nowhere/libnone.so")
    with pytest.raises(
        BundleError,
        match=rf"256 tokens and more by {name}, which is not here: "
        r".*libnone.so.*SINTERLM_VENDOR_GEMM.*--vendor-gemm",
    ):
        machine.open()
    with machine.open(max_tokens=16, max_seqs=8, max_sample_rows=8) as model:
        assert model.describe()["vendor_gemm"] == "", "no step has enough rows"
    monkeypatch.setenv("SINTERLM_VENDOR_GEMM", "libm.so.6")
    with pytest.raises(BundleError, match=r"libm.so.6 has no (hipblas|cublas)LtCreate: install"):
        machine.open()
    assert machine.driver.memory == {} and machine.gemm.handles == {}


def test_a_prompt_that_fits_no_unit(machine: VendorMachine) -> None:
    """Steps of 256, 257 and 300 tokens: rounded up to 128, at most what buffers hold."""
    machine.driver.run, machine.driver.poison = nothing, 0
    with machine.open() as model:
        model.alloc_kv(16, 128)
        for tokens in (256, 257, 300):
            machine.gemm.rows.clear()
            model.step(_prompt(tokens, 128))
            assert set(machine.gemm.rows) == {256 if tokens == 256 else 300}
    assert machine.driver.faults == []


@pytest.mark.slow
def test_what_an_engineer_with_a_device_will_run(
    machine: VendorMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step "vendor" of scripts/verify_gpu.py: each product and epilogue alone, and times."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    verify, device = import_module("verify_gpu"), import_module("gpu_device")
    bundle = device.Device(machine.bundle(), **device.MANY_SIZES)
    parts = [(i, launch.slot) for i, launch in enumerate(machine.table.launches)
             if launch.layer == 0 and launch.slot.endswith((".product", ".epilogue"))]  # fmt: skip
    assert len(parts) == 8
    for launch, slot in parts:
        errors = bundle.run_one(launch, "long")
        assert {"buffer:x", "buffer:sums", "k:0"} <= set(errors)
        assert not any(errors.values()), f"{slot}: the same twin on both sides"
    bundle.model.close()
    assert machine.driver.faults == []
    # Launches one by one, and again: no order of the table's. Of ours, none has so many rows here.
    monkeypatch.setattr(machine.driver, "_check_order", nothing)
    monkeypatch.setattr(verify, "WARMUP_US", 0)
    machine.driver.run, machine.driver.poison = nothing, 0
    machine.gemm.rows.clear()
    machine.gemm.most_tokens = max(verify.VENDOR_ROWS)
    times = verify.vendor_times(machine.bundle(), machine.bundle())
    assert set(times) == {"norm_qkv_rope_kv", "o_residual", "norm_gate_up_act", "down_residual"}
    for rows in times.values():
        assert rows == {str(n): [0.0, 1.0, 1.0] for n in verify.VENDOR_ROWS}
    assert set(machine.gemm.rows) == set(verify.VENDOR_ROWS) and machine.driver.faults == []
    assert verify.has_vendor_gemm(machine.driver.device.vendor)


def _prompt(tokens: int, page_tokens: int) -> StepBatch:
    """One sequence from its beginning, in the first pages."""
    pages = np.arange(-(-tokens // page_tokens), dtype=np.int32)
    return StepBatch(
        token_ids=np.full(tokens, 3, np.int32), positions=np.arange(tokens, dtype=np.int32),
        query_start=np.array([0, tokens], np.int32), context_lens=np.array([tokens], np.int32),
        page_table=pages[None, :], sample_rows=np.array([tokens - 1], np.int32),
        sampling=(RowSampling(position=tokens),), slots=np.zeros(1, np.int32),
    )  # fmt: skip


# -- a trained model, from checkpoint to text -----------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("target", ["gfx942", "sm_90"])
def test_a_trained_model_answers_as_on_a_cpu(
    target: str, tmp_path: Path, test_environment: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """``LLM`` with ``vendor_gemm``: a prompt of 256 tokens and more; the CPU's tokens."""
    prompt = "The old man looked at the sea, and the boy looked at him. " * 17
    options = {"max_model_len": 512, "max_num_seqs": 4, "max_num_batched_tokens": 512,
               "cache_dir": test_environment}  # fmt: skip
    greedy = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    with LLM(str(TRAINED), num_threads=1, kv_cache_memory_bytes=16 << 20, **options) as llm:
        (want,) = llm.generate([prompt], greedy)
    tokens = len(want.prompt_token_ids)
    assert 256 <= tokens <= 400
    made = CompileOptions(str(TRAINED), target=target, vendor_gemm=True, max_model_len=512,
                          cache_dir=test_environment)  # fmt: skip
    bundle = compile_model(made)
    plain = compile_model(dataclasses.replace(made, vendor_gemm=False))
    assert bundle.manifest.code_key != plain.manifest.code_key
    assert bundle.manifest.weights_key != plain.manifest.weights_key
    assert cli.main(["inspect", str(bundle.root)]) == 0
    assert "multiplies norm_qkv_rope_kv, o_residual" in " ".join(capsys.readouterr().out.split())
    table, objects = read_archive(archive_of(bundle.library_path.read_bytes()))
    driver = RecordingDriver(DEVICES[target], table, [(o.kernel, o.code) for o in objects])
    path = build_driver(tmp_path, DEVICES[target].vendor)
    driver.attach(path)
    monkeypatch.setenv("SINTERLM_GPU_DRIVER", str(path))
    gemm, path = RecordingGemm(driver, 512), build_gemm(tmp_path, DEVICES[target].vendor)
    gemm.attach(path)
    monkeypatch.setenv("SINTERLM_VENDOR_GEMM", str(path))
    with LLM(str(TRAINED), target=target, vendor_gemm=True, num_threads=1, **options) as llm:
        (found,) = llm.generate([prompt], greedy)
    assert list(found.outputs[0].token_ids) == list(want.outputs[0].token_ids)
    assert len(gemm.rows) == 4 * 6 and set(gemm.rows) == {-(-tokens // 128) * 128}
    assert driver.faults == []


def test_codes_alone_leave_the_vendor_nothing(tmp_path: Path) -> None:
    asked = CompileOptions(str(TRAINED), target="gfx942", vendor_gemm=True, quantization="int4",
                           cache_dir=tmp_path)  # fmt: skip
    with pytest.raises(UsageError, match="--vendor-gemm multiplies matrices in bf16"):
        compile_model(asked)
