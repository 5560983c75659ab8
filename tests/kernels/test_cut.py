"""How a GEMM is shared out among 2 to 128 workers: every output once, and nobody idle."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import pytest

from sinterlm.artifact.isa import best_isa
from tests.kernels import oplib
from tests.kernels.oplib import LANES, PANEL, OpLib
from tests.libraries import BuildLibrary


@dataclass(frozen=True)
class Gemm:
    """Columns, what an item is made of, and what an op finishes together."""

    cols: int
    unit: int
    granule: int


#: The GEMMs of a layer and the head; ``codes``: what reads their output takes int8 activations.
def gemms(hidden: int, heads: int, dim: int, ffn: int, vocab: int, codes: bool) -> dict[str, Gemm]:
    granule = 64 if codes else LANES
    return {
        "qkv": Gemm(heads * dim, dim, dim),
        "o, down": Gemm(hidden, PANEL, granule),
        "gate_up": Gemm(ffn, PANEL, granule),
        "lm_head": Gemm(vocab, PANEL, PANEL),
    }


MODELS = {
    "SmolLM2-135M": (576, 9 + 6, 64, 1536, 49152),
    "Qwen2.5-1.5B": (1536, 12 + 4, 128, 8960, 151936),
    "QwQ-32B": (5120, 40 + 16, 128, 27648, 152064),
    "odd": (144, 5, 80, 192, 192),
}
WORKERS = (1, 2, 3, 7, 16, 31, 64, 96, 128)


@pytest.fixture(scope="module")
def ops(build_library: BuildLibrary) -> OpLib:
    return OpLib(best_isa(), build_library(oplib.SOURCE.read_text(), best_isa()))


def busy(blocks: np.ndarray, workers: int) -> np.ndarray:
    """Outputs that each worker computes, when whoever is free claims the next item."""
    free = [(0, worker) for worker in range(workers)]
    for c0, c1, r0, r1 in blocks.tolist():
        done, worker = heapq.heappop(free)
        heapq.heappush(free, (done + (c1 - c0) * (r1 - r0), worker))
    return np.array([done for done, _ in free])


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_every_output_once(ops: OpLib, model: str, codes: bool) -> None:
    for name, gemm in gemms(*MODELS[model], codes).items():
        for workers in WORKERS:
            for rows in (1, 5, 48, 128, 700):
                blocks = ops.cut(gemm.cols, rows, gemm.unit, gemm.granule, workers)
                c0, c1, r0, r1 = blocks.T
                assert np.all((c0 % LANES == 0) & (c1 % LANES == 0) & (c0 < c1) & (r0 < r1))
                areas = (c1 - c0) * (r1 - r0)
                assert areas.sum() == gemm.cols * rows, (name, workers, rows)
                seen = {tuple(block) for block in np.stack([c0, r0], 1).tolist()}
                assert len(seen) == len(blocks), "two items begin alike"


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 32, 128])
def test_workers_are_busy_at_1_5b(ops: OpLib, rows: int, codes: bool) -> None:
    """At 2 to 128 workers the busiest does at most an eighth more than if every matrix came in the
    narrowest slices, and at 64 and 128 at least three quarters of the slots are filled."""
    for name, gemm in gemms(*MODELS["Qwen2.5-1.5B"], codes).items():
        for workers in range(2, 129):
            work = busy(ops.cut(gemm.cols, rows, gemm.unit, gemm.granule, workers), workers)
            even = -(-gemm.cols // LANES // workers) * LANES * rows
            longest = max(even, gemm.cols * rows / workers)
            assert work.max() <= 1.125 * longest, (name, workers)
            if workers in (64, 128):
                assert work.sum() >= 0.75 * workers * work.max(), (name, workers)


@pytest.mark.parametrize("workers", [5, 16, 64])
@pytest.mark.parametrize("bf16", [True, False])
def test_sharing_a_head_changes_no_bit(ops: OpLib, bf16: bool, workers: int) -> None:
    """More workers than heads: slices of a head meet in shared memory, also in row blocks."""
    rng = np.random.default_rng(0)
    for rows in (1, 3, 100):
        xw = rng.normal(size=(rows, 72)).astype("f4")
        w = (rng.normal(size=(3 * 80, 72)) / 8).astype("f4")
        ssq = rng.uniform(5, 20, size=(rows, 5)).astype("f4")
        norm = rng.normal(size=80).astype("f4")
        cos, sin = rng.normal(size=(2, rows, 40)).astype("f4")
        seen = []
        for threads in (1, workers):
            step = oplib.PagedStep([rows], [rows], 1, 80, 32, bf16)
            q = ops.qkv(
                step, xw, ssq, w, None, norm, norm, cos, sin, 1e-5, 1e-6, 1, threads=threads
            )
            kv = [x for pos in range(rows) for x in step.load(0, pos)]
            seen.append((q.tobytes(), np.array(kv).tobytes()))
        assert seen[0] == seen[1], rows
