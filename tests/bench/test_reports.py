"""Reports add up, whatever the times were."""

from __future__ import annotations

from statistics import median

import numpy as np
import pytest

from sinterlm.artifact.bundle import Bundle
from sinterlm.artifact.manifest import OpCost
from sinterlm.bench import kernels, throughput
from sinterlm.bench.recording import StepRecord
from sinterlm.bench.results import Peaks
from sinterlm.bench.setup import peaks_around
from sinterlm.errors import ResourceError, UsageError
from sinterlm.options import EngineOptions
from sinterlm.runtime.roofline import Step, batch_loads, fraction, step_loads

OPTIONS = EngineOptions(
    max_model_len=64, max_num_seqs=4, max_num_batched_tokens=32, block_size=16, num_threads=2
)


def told_nothing(text: str) -> None:
    assert text


# -- roofs -----------------------------------------------------------------------------------------


def test_a_batch_reads_weights_once_and_each_cache() -> None:
    attention = OpCost("attention", 0, 1000, 10, 0, 3, 100, 0, 2)
    load = batch_loads([attention], [0], [Step(1, 10), Step(4, 6, 0)])[0]
    assert load.nbytes == 1000 + 5 * 10 + (10 + 6) * 3
    assert load.flops == 5 * 100 + (10 + 3 + 4 + 5 + 6) * 2


def test_a_step_without_rows_leaves_the_head_unread() -> None:
    head = OpCost("norm_lm_head_sample", -1, 1000, 0, 0, 0, 0, 50, 0)
    assert [load.nbytes for load in step_loads([head], [], Step(8, 8, 0))] == [0]
    loads = batch_loads([head], [], [Step(8, 8, 0), Step(1, 9, 1)])
    assert [(load.nbytes, load.flops) for load in loads] == [(1000, 50)]


def test_no_fraction_beyond_belief() -> None:
    assert fraction(0.5, 1.0) == 0.5
    assert fraction(1.02, 1.0) == 1.02
    assert fraction(1.03, 1.0) is None


def test_the_probes_around_a_run() -> None:
    probes = [Peaks(bandwidth, 10 - bandwidth) for bandwidth in (1, 5, 2, 3, 4)]
    assert peaks_around(probes, 0, 2) == [Peaks(5, 9), Peaks(3, 8)]
    assert peaks_around(probes, 1, 2) == [Peaks(5, 8), Peaks(4, 7)]


def test_decode_step_is_the_median_gap_at_the_fullest() -> None:
    def record(end: float, lengths: list[int]) -> StepRecord:
        starts = np.cumsum([0, *lengths]).astype(np.int32)
        contexts = np.full(len(lengths), 20, np.int32)
        return StepRecord(end - 0.001, end, starts, contexts, starts[1:] - 1)

    steps = [record(1, [8]), record(2, [1, 8]), record(4, [1, 1]), record(7, [1, 1]),
             record(8, [1, 1]), record(20, [1])]  # fmt: skip
    assert throughput.decode_step(steps) == 2  # of 2, 3 and 1
    assert throughput.decode_step(steps[:2]) is None


# -- whole benchmarks ------------------------------------------------------------------------------


def test_throughput_report(tiny: Bundle, high_roof: list[tuple[float, float]]) -> None:
    work = throughput.Workload((1, 3), input_len=8, output_len=4, rounds=2)
    report = throughput.measure_throughput(tiny, OPTIONS, work, told_nothing)
    assert len(report.probes) == len(high_roof) == 2 * 2 + 1
    assert report.model.num_threads == 2
    windows = tiny.manifest.constants.windows
    for number, case in enumerate(report.cases):
        count = work.num_prompts[number]
        assert case.num_steps == [4, 4]
        typical = median(case.elapsed_s)
        assert case.total_tokens_per_s == pytest.approx(count * 12 / typical)
        assert case.output_tokens_per_s == pytest.approx(count * 4 / typical)
        assert case.decode_step_s is not None and 0 < min(case.decode_step_s) < typical
        shapes = [(8, 8), (1, 9), (1, 10), (1, 11)]
        for round_number in range(2):
            peaks = report.probes[2 * round_number + number + 1]  # the later one found more
            roof = sum(
                load.seconds(peaks.bytes_per_s, peaks.flops_per_s)
                for tokens, context in shapes
                for load in batch_loads(tiny.manifest.ops, windows, [Step(tokens, context)] * count)
            )
            assert case.roof_s[round_number] == pytest.approx(roof)
            share = case.fractions[round_number]
            assert share == pytest.approx(roof / case.elapsed_s[round_number])


def test_kernels_budget_adds_up(tiny: Bundle, high_roof: list[tuple[float, float]]) -> None:
    shapes = (kernels.Shape(1, 20), kernels.Shape(4, 40), kernels.Shape(1, 32, is_prefill=True))
    plan = kernels.Plan(shapes, num_steps=3, rounds=3)
    report = kernels.measure_kernels(tiny, OPTIONS, plan, told_nothing)
    assert len(report.probes) == len(high_roof) == 3 * 3 + 1
    layers = tiny.manifest.shape.num_layers
    for shape, case in zip(shapes, report.cases, strict=True):
        assert sum(part.seconds for part in case.budget) == pytest.approx(case.step_s, rel=1e-9)
        assert all(part.seconds >= 0 for part in case.budget), case.budget
        assert case.step_s == sorted(case.rounds_s)[1]
        assert {op.name for op in case.ops} == {op.name for op in tiny.manifest.ops}
        assert {op.calls for op in case.ops} == {1, layers}
        losses = [op.lost_s for op in case.ops]
        assert losses == sorted(losses, reverse=True)
        assert case.roof_s == pytest.approx(sum(op.roof_s for op in case.ops))
        assert case.fraction == pytest.approx(case.roof_s / case.step_s)
        assert case.num_tokens == shape.num_tokens
        first = shape.context_len if shape.is_prefill else shape.context_len + kernels.WARM_UP + 1
        assert case.context_len == first
        mean = first + (0 if shape.is_prefill else 1)  # of three decode steps, the second
        attention = next(op for op in case.ops if op.name == "attention")
        kv_bytes = layers * 2 * tiny.manifest.shape.num_kv_heads * tiny.manifest.shape.head_dim * 2
        assert attention.nbytes == shape.num_seqs * mean * kv_bytes
        assert attention.bytes_per_s == pytest.approx(attention.nbytes / attention.seconds)


def test_a_run_above_its_roof_has_no_fraction(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sinterlm.bench.recording.RecordingModel.probe", lambda *_: (1e-3, 1e-3))
    work = throughput.Workload((1,), input_len=8, output_len=2, rounds=1)
    case = throughput.measure_throughput(tiny, OPTIONS, work, told_nothing).cases[0]
    assert case.fractions == [None]
    assert case.fraction is None


def test_what_does_not_fit_is_refused(tiny: Bundle) -> None:
    work = throughput.Workload((1,), input_len=60, output_len=5, rounds=1)
    with pytest.raises(UsageError, match="--max-model-len of 65"):
        throughput.measure_throughput(tiny, OPTIONS, work, told_nothing)
    plan = kernels.Plan((kernels.Shape(5, 60),), num_steps=1, rounds=1)
    with pytest.raises(ResourceError, match="25 KV pages"):
        kernels.measure_kernels(tiny, OPTIONS, plan, told_nothing)
