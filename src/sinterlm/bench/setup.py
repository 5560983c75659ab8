"""What every benchmark begins with: a recording model, its peaks, its prompts, and the facts."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from sinterlm import __version__
from sinterlm.artifact.bundle import Bundle
from sinterlm.bench.recording import RecordingModel
from sinterlm.bench.results import MachineFacts, ModelFacts, Peaks
from sinterlm.engine.llm import LLM
from sinterlm.options import EngineOptions
from sinterlm.runtime.machine import cpu_name, read_machine

#: Seconds of one probe beside the making of its buffer.
PROBE_S = 0.5

#: Told what is measured next; must leave nothing running that would disturb it.
Tell = Callable[[str], None]


@contextmanager
def open_recording(bundle: Bundle, options: EngineOptions) -> Iterator[tuple[LLM, RecordingModel]]:
    """Load ``bundle`` for measuring; freed at the end. Raises as ``LLM`` does."""
    with LLM.from_bundle(bundle, options, open_model=RecordingModel) as llm:
        assert isinstance(llm.model, RecordingModel)
        yield llm, llm.model


def probe(model: RecordingModel) -> Peaks:
    """Bandwidth and peak now. Raises ResourceError for want of memory."""
    gflops, gbytes = model.probe(PROBE_S)
    return Peaks(gbytes * 1e9, gflops * 1e9)


def peaks_around(probes: Sequence[Peaks], case: int, num_cases: int) -> list[Peaks]:
    """For each round of ``case``, the better of the probes before and after its run, where
    ``probes`` holds one before each run of ``num_cases`` interleaved cases and one at the end."""
    return [Peaks.best(probes[i : i + 2]) for i in range(case, len(probes) - 1, num_cases)]


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """``count`` prompts of ``length`` uniform token ids; the same for the same seed."""
    generator = np.random.default_rng(seed)
    ids: list[list[int]] = generator.integers(0, vocab_size, (count, length)).tolist()
    return ids


def machine_facts() -> MachineFacts:
    """This machine as this process sees it."""
    machine = read_machine()
    return MachineFacts(
        cpu=cpu_name(),
        num_cpus=machine.num_cpus,
        cpu_quota=machine.cpu_quota,
        memory_bytes=machine.memory_limit,
        system=platform.platform(),
        versions={
            "sinterlm": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
    )


def model_facts(bundle: Bundle, model: RecordingModel) -> ModelFacts:
    """What the loaded library says of itself."""
    facts = model.describe()
    return ModelFacts(
        model=bundle.manifest.model,
        isa=facts["isa"],
        dtype=bundle.manifest.dtypes,
        weights_bytes=facts["weights_bytes"],
        num_threads=facts["num_threads"],
        huge_pages=facts["huge_pages"],
        bundle_sha256=bundle.manifest_sha256,
    )
