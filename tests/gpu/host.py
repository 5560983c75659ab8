"""A tiny model's library for a GPU with the driver that it runs on, for tests of the host."""

from __future__ import annotations

import subprocess
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from sinterlm.backends.gpu.simulator import Part, Simulator
from sinterlm.backends.gpu.table import LEFT_OUT, Choice, Table
from sinterlm.backends.gpu.vendor import LEAST_ROWS
from sinterlm.compile import model_constants, model_shape
from sinterlm.runtime.batch import RowSampling, StepBatch
from sinterlm.runtime.model import Model
from tests.conftest import ROOT
from tests.gpu.models import TinyGpu
from tests.gpu.recording import RecordingDriver

PAGES = {0: [3, 9, 5], 1: [0, 7, 2], 2: [12, 1, 14]}
PROMPTS = {0: [5, 17, 99, 3, 120, 8, 64], 1: [1], 2: [130, 22, 22]}


def _includes() -> list[Path]:
    """Headers of the vendors, which Triton's wheel brings, and ours."""
    backends = Path(sysconfig.get_paths()["purelib"]) / "triton/backends"
    ours = ("backends/gpu/host", "backends/cpu/include", "artifact")
    return [backends / "amd/include", backends / "nvidia/include",
            *(ROOT / "src/sinterlm" / path for path in ours)]  # fmt: skip


def build_driver(folder: Path, vendor: str) -> Path:
    """The fake driver of ``hip`` or ``cuda``, against the headers that Triton's wheel brings."""
    out = folder / ("libamdhip64.so" if vendor == "hip" else "libcuda.so.1")
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-w", f"-DFAKE_{vendor.upper()}"]
    command += [f"-I{path}" for path in _includes()]
    subprocess.run([*command, ROOT / "tests/gpu/fake_driver.cpp", "-o", out], check=True)
    return out


def build_gemm(folder: Path, vendor: str) -> Path:
    """The fake GEMM library of ``hip`` or ``cuda``, against what Triton's wheel brings of it."""
    out = folder / ("libhipblaslt.so" if vendor == "hip" else "libcublasLt.so.12")
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", f"-DFAKE_{vendor.upper()}"]
    command += [f"-I{path}" for path in _includes()]
    subprocess.run([*command, ROOT / "tests/gpu/fake_gemm.cpp", "-o", out], check=True)
    return out


def for_few_rows(table: Table) -> Table:
    """The kernels that steps of at most 16 tokens need, and of 256 and more where a vendor's GEMM
    is used: others would only be compiled."""
    of_vendor = {choice.slot for choice in table.choices if choice.kernel == LEFT_OUT}
    chosen: dict[tuple[str, str], Choice] = {}
    for choice in table.choices:
        most = LEAST_ROWS - 1 if choice.slot in of_vendor else 0
        chosen.setdefault((choice.slot, choice.kind), replace(choice, most=most))
    choices = [*chosen.values()]
    choices += [c for c in table.choices if c.slot in of_vendor and c.most == 0]
    kept = sorted({c.kernel for c in choices} - {LEFT_OUT})
    return replace(
        table,
        kernels=tuple(replace(table.kernels[old], id=new) for new, old in enumerate(kept)),
        choices=tuple(
            c if c.kernel == LEFT_OUT else replace(c, kernel=kept.index(c.kernel)) for c in choices
        ),
    )


@dataclass
class Machine:
    """A library with its driver, and what it was made from."""

    tiny: TinyGpu
    table: Table
    driver: RecordingDriver
    library: Path
    weights: Path
    shared_bytes: dict[int, int]  #: of each kernel, by id

    def bundle(self) -> Any:
        """What ``Model`` takes of a bundle."""
        config = self.tiny.graph.config
        manifest = SimpleNamespace(
            constants=model_constants(config), layout_hash=self.tiny.plan.layout.layout_hash,
            shape=model_shape(config), kv_bytes_per_token=config.num_layers * config.num_kv_heads
            * config.head_dim * 2 * self.table.facts["kv_bytes"],
        )  # fmt: skip
        return SimpleNamespace(
            manifest=manifest, weights_path=self.weights, library_path=self.library,
            root=self.library.parent,
        )  # fmt: skip

    def open(self, **sizes: int) -> Model:
        given = {"max_tokens": 16, "max_seqs": 8, "max_sample_rows": 8, "max_model_len": 64,
                 "num_slots": 4, **sizes}  # fmt: skip
        return Model(self.bundle(), num_threads=1, **given)


def batch(
    *runs: tuple[int, int, list[int]], sampling: RowSampling | None = None, logits: bool = True,
    slots: bool = True,
) -> StepBatch:  # fmt: skip
    """(sequence, first position, tokens) of each; every sequence is drawn after its last token."""
    lengths = [len(tokens) for _, _, tokens in runs]
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    table = np.zeros((len(runs), 4), np.int32)
    for row, (seq, *_) in zip(table, runs, strict=True):
        row[:3] = PAGES[seq]
    ends = [first + len(tokens) for _, first, tokens in runs]
    rows = tuple(replace(sampling or RowSampling(), position=end) for end in ends)
    return StepBatch(
        token_ids=np.concatenate([t for *_, t in runs]).astype(np.int32),
        positions=np.concatenate([f + np.arange(len(t)) for _, f, t in runs]).astype(np.int32),
        query_start=starts,
        context_lens=np.array(ends, np.int32),
        page_table=table,
        sample_rows=starts[1:] - 1,
        sampling=rows,
        slots=np.array([seq for seq, *_ in runs], np.int32) if slots else None,
        want_logits=logits,
        max_logprobs=0 if sampling is None else max(0, sampling.num_logprobs),
    )


def steps_of(model: Model, simulator: Simulator, runs: list[tuple[int, int, list[int]]]) -> None:
    """One step on both; equal tokens, and equal bits of logits."""
    found = model.step(batch(*runs))
    want = simulator.step(*(Part(PAGES[s], f, t, slot=s) for s, f, t in runs))
    assert found.logits is not None
    assert np.array_equal(found.logits, want.logits)
    assert found.tokens.tolist() == want.ids.tolist()
