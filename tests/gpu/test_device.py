"""A trained model on a real device: `pytest -m gpu tests/gpu`, skipped where there is none. The
same on a driver of no device shows that these tests are sound."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sinterlm import LLM, SamplingParams
from sinterlm.artifact.bundle import Bundle
from sinterlm.backends.gpu.devices import DEVICES
from sinterlm.backends.gpu.library import archive_of
from sinterlm.backends.gpu.objects import read_archive
from sinterlm.bench.eval_metrics import compare
from sinterlm.compile import compile_model
from sinterlm.engine.batching import logits_batch
from sinterlm.options import CompileOptions, EngineOptions
from sinterlm.runtime.gpu_devices import DriverError, devices_of
from sinterlm.runtime.model import Model
from tests.conftest import ROOT
from tests.gpu.host import build_driver
from tests.gpu.recording import RecordingDriver

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("triton")]

TRAINED = str(ROOT / "tests/assets/tiny-llama")
DRIVERS = ("libcuda.so.1", "libamdhip64.so")


@functools.cache
def look() -> tuple[str, str]:
    """The ``--target`` for a device of this machine, or "", and what was found."""
    found = []
    for file in DRIVERS:
        try:
            devices = devices_of(file)
        except DriverError as exc:
            found.append(str(exc))
            continue
        for device in devices:
            if device.target:
                return device.target, str(device)
        found.append(f"{file} sees {', '.join(map(str, devices)) or 'no device'}")
    return "", "; ".join(found)


@pytest.fixture(params=[pytest.param("device", marks=pytest.mark.gpu), "gfx942"])
def bundle(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bundle]:
    """The model for the device, or with a driver of none."""
    is_real = request.param == "device"
    target, found = look() if is_real else (request.param, "")
    if not target:
        pytest.skip(f"needs a GPU that --target has a name for: {found}")
    made = compile_model(CompileOptions(TRAINED, target=target, max_model_len=256))
    if is_real:
        yield made
        return
    table, objects = read_archive(archive_of(made.library_path.read_bytes()))
    driver = RecordingDriver(DEVICES[target], table, [(o.kernel, o.code) for o in objects])
    path = build_driver(tmp_path, DEVICES[target].vendor)
    driver.attach(path)
    monkeypatch.setenv("SINTERLM_GPU_DRIVER", str(path))
    yield made
    assert driver.faults == []


@pytest.fixture(scope="module")
def logits() -> Iterator[ModuleType]:
    """scripts/gpu_logits.py, as `make verify-gpu` uses it, for few tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        module = import_module("gpu_logits")
        for name, value in {"PIECES": (12, 16, 5), "ANSWER": 4, "PAGE": 16}.items():
            patch.setattr(module, name, value)
        yield module


@pytest.fixture(scope="module")
def wanted(logits: ModuleType) -> Any:
    """What the CPU says."""
    return logits.reference(TRAINED)


def test_logits_are_the_cpus_and_graphs_change_no_bit(
    bundle: Bundle, logits: ModuleType, wanted: Any
) -> None:
    """By launches, and by graphs in a second round."""
    found = []
    for rounds in (1, 2):
        with Model(bundle, num_threads=1, eager=rounds == 1, **logits.sizes()) as model:
            found.append(logits.forced_logits(model, wanted, rounds))
            replayed = model.describe()["graph_launches"]
        assert replayed == 0 if rounds == 1 else replayed >= 3
    logits.verdict(wanted, found[0])
    assert np.array_equal(*found)


def test_company_changes_no_bit(bundle: Bundle, logits: ModuleType, wanted: Any) -> None:
    """Steps of one row and of three are made by the same kernels, for at most 16."""
    with Model(bundle, num_threads=1, **logits.sizes()) as model:
        together = logits.forced_logits(model, wanted)
        rows = len(wanted.sequences[0]) - 1
        first = replace(wanted, pieces=wanted.pieces[:1], sequences=wanted.sequences[:1],
                        bf16=wanted.bf16[:rows])  # fmt: skip
        assert np.array_equal(logits.forced_logits(model, first), together[:rows])


def test_greedy_tokens_are_the_cpus(bundle: Bundle) -> None:
    """Through the engine: prompts that come together, decode steps by graphs."""
    prompts = ["The old man looked at", "In the"]
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    options = EngineOptions(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64,
                            kv_cache_memory_bytes=4 << 20, num_threads=1)  # fmt: skip
    cpu = compile_model(CompileOptions(TRAINED, max_model_len=256))
    tokens = []
    for one in (cpu, bundle):
        with LLM.from_bundle(one, options) as llm:
            answers = llm.generate(prompts, greedy)
            tokens.append([list(answer.outputs[0].token_ids) for answer in answers])
            facts = llm.model.describe()
    assert facts["graph_launches"] > 0
    assert tokens[1] == tokens[0]


def test_hidden_states_and_the_head(bundle: Bundle, logits: ModuleType, wanted: Any) -> None:
    """A step that gives hidden states out, and the head of these: the logits of other steps."""
    ids = wanted.sequences[0][: wanted.pieces[0]]
    batch = logits_batch(ids, 0, np.arange(1, dtype=np.int32))
    with Model(bundle, num_threads=1, **logits.sizes()) as model:
        model.alloc_kv(4, 16)
        straight = model.step(batch).logits
        hidden = np.full((len(ids), bundle.manifest.shape.hidden_size), np.nan, np.float32)
        model.hidden(batch, hidden)
        found = model.head(hidden)
    # Their norm is rounded to bf16 behind the scale, that of the step before it.
    targets = wanted.targets[: len(ids)]
    for other in (straight, wanted.bf16[: len(ids)]):
        assert compare(other, found, targets).kl.mean() < 1e-4
