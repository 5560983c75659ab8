"""The host of GPU libraries, whole, on a driver that records, checks and interprets: the real C++,
real code objects, real launches. What they compute is Triton's interpreter's word (docs/gpu.md)."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sinterlm import LLM, SamplingParams
from sinterlm.backends.gpu.devices import DEVICES
from sinterlm.backends.gpu.library import archive_of
from sinterlm.backends.gpu.objects import read_archive
from sinterlm.backends.gpu.simulator import Part, Simulator
from sinterlm.compile import compile_model
from sinterlm.errors import BundleError, ResourceError, RuntimeFault
from sinterlm.ir.bf16 import from_bf16
from sinterlm.options import CompileOptions
from sinterlm.runtime.batch import RowSampling
from sinterlm.runtime.device_probe import device_memory
from tests.conftest import ROOT
from tests.gpu.host import PAGES, PROMPTS, Machine, batch, build_driver, steps_of
from tests.gpu.recording import Launched, RecordingDriver

pytestmark = pytest.mark.usefixtures("triton")

TRAINED = ROOT / "tests/assets/tiny-llama"


def nothing(launched: Launched) -> None:
    """What a launch does where only the calls are looked at."""


def test_a_generation_is_the_simulators(machine: Machine) -> None:
    """Prefill, a mixed step, decode fed from the device's slots, then decode by a graph."""
    simulator = Simulator(machine.table, machine.tiny.packed, machine.tiny.graph.config.rope)
    with machine.open() as model:
        model.alloc_kv(16, 16)
        steps_of(model, simulator, [(s, 0, PROMPTS[s]) for s in (0, 1)])
        steps_of(model, simulator, [(2, 0, PROMPTS[2]), (0, 7, [-1])])
        for i in range(2):
            steps_of(model, simulator, [(0, 8 + i, [-1]), (1, 1 + i, [-1]), (2, 3 + i, [-1])])
        facts = model.describe()
        assert (facts["steps"], facts["graph_launches"]) == (4, 1)
        assert facts["device"] == "fake device"
    assert machine.driver.faults == []
    kinds = [launched.kernel.name for launched in machine.driver.trace]
    assert len(kinds) == 4 * machine.table.per_step
    assert machine.driver.calls.count("capture_begin") == 1
    assert machine.driver.memory == {} and machine.driver.pinned == {}, "something was kept"
    left = [h for h in machine.driver.handles.values() if h != "context"]
    assert left == [], "handles were kept"


def test_a_step_waits_and_copies_but_never_allocates(machine: Machine) -> None:
    machine.driver.run, machine.driver.poison = nothing, 0
    with machine.open() as model:
        model.alloc_kv(16, 16)
        model.step(batch((0, 0, [5, 17]), (1, 0, [9]), logits=False))
        before = len(machine.driver.calls)
        for i in range(3):
            model.step(batch((0, 2 + i, [-1]), (1, 1 + i, [-1]), logits=False))
        calls = machine.driver.calls[before:]
    launches = machine.table.per_step
    forbidden = {"allocate", "release", "host_allocate", "host_release", "module_load"}
    assert not forbidden & set(calls)
    assert calls.count("launch") == 2 * launches  # eagerly, then while capturing
    assert calls.count("graph_launch") == 2 and calls.count("stream_wait") == 3
    assert calls.count("to_device") == 3, "one copy of inputs for each step"


@pytest.mark.slow
def test_rows_that_the_device_does_not_draw(machine: Machine) -> None:
    """Log-probabilities, filters and masks come from the logits, by the sampler that CPUs have."""
    with machine.open() as model:
        model.alloc_kv(16, 16)
        plain = model.step(batch((0, 0, PROMPTS[0])))
        assert plain.logits is not None
        logits = plain.logits[0].astype(np.float64)
        want = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        asked = RowSampling(num_logprobs=3)
        found = model.step(batch((1, 0, PROMPTS[0]), sampling=asked))
        best = np.argsort(-logits, kind="stable")[:3]
        assert found.tokens[0] == plain.tokens[0] == best[0]
        assert found.ranks[0] == 1 and found.top_ids[0].tolist() == best.tolist()
        assert np.allclose(found.top_logprobs[0], want[best], atol=1e-5)
        ban = RowSampling(bias_ids=np.array([best[0]], np.int32),
                          bias=np.array([-np.inf], np.float32))  # fmt: skip
        assert model.step(batch((1, 0, PROMPTS[0]), sampling=ban)).tokens[0] == best[1]
        # Fed on from the slot that the host's draw went to.
        fed = model.step(batch((1, 7, [-1])))
        given = model.step(batch((1, 7, [int(best[1])])))
        assert np.array_equal(fed.logits, given.logits)
        warm = RowSampling(temperature=0.9, seed=11)
        drawn = [int(model.step(batch((1, 0, PROMPTS[0]), sampling=replace(warm, seed=seed))
                                ).tokens[0]) for seed in range(4)]  # fmt: skip
        assert len(set(drawn)) > 1, "the seed does nothing"
    assert machine.driver.faults == []


def test_hidden_states_and_the_head(machine: Machine) -> None:
    """As a CPU's library gives and takes them, in fp32; more rows than a step samples."""
    simulator = Simulator(machine.table, machine.tiny.packed, machine.tiny.graph.config.rope)
    with machine.open(max_sample_rows=4) as model:
        model.alloc_kv(16, 16)
        found = np.full((8, machine.tiny.graph.config.hidden_size), np.nan, np.float32)
        model.hidden(batch((0, 0, PROMPTS[0]), (1, 0, PROMPTS[1])), found)
        want = simulator.step(*(Part(PAGES[s], 0, PROMPTS[s], slot=s) for s in (0, 1)), hidden=True)
        assert np.array_equal(found, from_bf16(want.hidden))
        logits = model.head(found)
        assert np.array_equal(logits, simulator.head(want.hidden).logits)
        # The caches are those of an ordinary step.
        steps_of(model, simulator, [(0, 7, [4]), (1, 1, [5])])
    assert machine.driver.faults == []


@pytest.mark.slow
def test_several_steps_in_one_call(machine: Machine) -> None:
    with machine.open() as model:
        model.alloc_kv(16, 16)
        first = model.step(batch((0, 0, PROMPTS[0]), logits=False)).tokens
        one_by_one = [int(first[0])]
        for i in range(3):
            step = model.step(batch((0, 7 + i, one_by_one[-1:]), logits=False))
            one_by_one.append(int(step.tokens[0]))
        many = model.decode(batch((0, 7, [int(first[0])]), logits=False), 3)
        assert [int(step.tokens[0]) for step in many] == one_by_one[1:]
        stop = RowSampling(stop_tokens=np.array(one_by_one[1:2], np.int32))
        stopped = model.decode(batch((0, 7, [int(first[0])]), sampling=stop, logits=False), 3)
        assert len(stopped) == 1
    assert machine.driver.faults == []


def test_memory_is_told_before_anything_is_taken(machine: Machine) -> None:
    sizes = {"max_tokens": 16, "max_seqs": 8, "max_sample_rows": 8, "max_model_len": 64}
    told = device_memory(machine.library, **sizes)
    assert machine.driver.memory == {} and told.free == told.total == machine.driver.capacity
    with machine.open(num_slots=0) as model:
        assert model.describe()["workspace_bytes"] == told.workspace
        later = device_memory(machine.library, **sizes)
        assert later.free == told.total - sum(a.nbytes for a in machine.driver.memory.values())
    with pytest.raises(RuntimeFault, match="max_seqs is 17"):
        device_memory(machine.library, **{**sizes, "max_seqs": 17})
    machine.driver.fails["memory"] = 999
    with pytest.raises(RuntimeFault, match="asking for the memory of the device"):
        device_memory(machine.library, **sizes)
    machine.driver.fails.clear()
    machine.driver.fails["device_count"] = 100
    with pytest.raises(ResourceError, match="finds no device"):
        device_memory(machine.library, **sizes)


# -- faults that the driver must see ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("mutation", "named"),
    [
        pytest.param("NO_SCRATCH", "scratch|no argument", marks=pytest.mark.mutation("NO_SCRATCH")),
        pytest.param("SWAPPED", "and was at", marks=pytest.mark.mutation("SWAPPED")),
        pytest.param("SMALL_GRID", "programs along", marks=pytest.mark.mutation("SMALL_GRID")),
        pytest.param("STALE_KV", "no memory of the device",
                     marks=pytest.mark.mutation("STALE_KV")),
        pytest.param("WAIT_IN_CAPTURE", "captured",
                     marks=pytest.mark.mutation("WAIT_IN_CAPTURE")),
        pytest.param("ALLOCATE_IN_CAPTURE", "captured",
                     marks=pytest.mark.mutation("ALLOCATE_IN_CAPTURE")),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_planted_faults_are_seen(machine: Machine, mutation: str, named: str) -> None:
    """A host that is broken on purpose: the driver refuses a call."""
    driver = machine.driver
    with machine.open() as model, contextlib.suppress(RuntimeFault):
        model.alloc_kv(16, 16)
        model.step(batch((0, 0, [5, 17]), (1, 0, [9]), logits=False))
        for i in range(3):
            if i == 2:
                model.alloc_kv(12, 32)  # pages move: a graph that keeps the old ones is stale
                driver.run = nothing
            model.step(batch((0, 2 + i, [-1]), (1, 1 + i, [-1]), logits=False))
    assert driver.faults and re.search(named, driver.faults[0]), driver.faults


# -- errors ----------------------------------------------------------------------------------------


def test_what_is_wrong_is_said(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = machine.driver
    driver.run = nothing
    driver.device = replace(driver.device, name="other")
    with pytest.raises(
        BundleError, match=r"the device is fake device, and the bundle was compiled"
    ):
        machine.open()
    driver.device = DEVICES[machine.table.device]
    driver.capacity = 1 << 16
    with pytest.raises(ResourceError, match="the device is out of memory"):
        machine.open()
    driver.capacity = 1 << 30
    assert driver.memory == {}
    with machine.open() as model:
        model.alloc_kv(16, 16)
        with pytest.raises(ResourceError, match="for the KV cache: the device is out of memory"):
            model.alloc_kv(1 << 20, 16)
        model.alloc_kv(16, 16)
        driver.lost = True
        with pytest.raises(RuntimeFault, match=r"running the step: .* error 700 \(text of 700\)"):
            model.step(batch((0, 0, [5])))
        driver.lost = False
        with pytest.raises(RuntimeFault, match="the device failed in an earlier step"):
            model.step(batch((0, 0, [5])))
    with pytest.raises(RuntimeFault, match="max_seqs is 512"):
        machine.open(max_tokens=512, max_seqs=512)
    driver.fails = {"device_count": 100}
    with pytest.raises(BundleError, match="finds no device"):
        machine.open()
    monkeypatch.setenv("SINTERLM_GPU_DRIVER", "/nowhere/libnone.so")
    with pytest.raises(BundleError, match=r"no (HIP|CUDA) driver: .*libnone.so"):
        machine.open()


def test_library_and_archive_come_apart_again(machine: Machine) -> None:
    table, _ = read_archive(archive_of(machine.library.read_bytes()))
    assert table == machine.table
    with pytest.raises(ValueError, match="no launch table behind it"):
        archive_of(machine.library.read_bytes()[:-1])


# -- a trained model, from checkpoint to text ------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("target", ["gfx942", "sm_90"])
def test_a_trained_model_answers_as_on_a_cpu(
    target: str, tmp_path: Path, test_environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``LLM`` on a GPU target: two requests in one batch, greedy; the CPU's tokens."""
    prompts = ["The old man looked at", "In the"]
    options = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 16,
               "cache_dir": test_environment}  # fmt: skip
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with LLM(str(TRAINED), num_threads=1, kv_cache_memory_bytes=4 << 20, **options) as llm:
        want = [list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, greedy)]
    bundle = compile_model(CompileOptions(str(TRAINED), target=target, max_model_len=64,
                                          cache_dir=test_environment))  # fmt: skip
    table, objects = read_archive(archive_of(bundle.library_path.read_bytes()))
    driver = RecordingDriver(DEVICES[target], table, [(o.kernel, o.code) for o in objects])
    path = build_driver(tmp_path, DEVICES[target].vendor)
    driver.attach(path)
    monkeypatch.setenv("SINTERLM_GPU_DRIVER", str(path))
    with LLM(str(TRAINED), target=target, num_threads=1, **options) as llm:
        found = [list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, greedy)]
        assert llm.model.describe()["graph_launches"] > 0
        assert llm.plan.num_pages == 4, "by itself: a full context of each sequence"
    assert found == want
    assert driver.faults == []
