"""Where a step's time goes: each kind of fused op against its roof, the call around the ops, and
Python; the parts add up to the measured step. Decode at a context needs no prefill of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

from sinterlm.artifact.bundle import Bundle
from sinterlm.artifact.manifest import Manifest
from sinterlm.bench.phases import PhasedEngine
from sinterlm.bench.recording import RecordingModel, StepRecord
from sinterlm.bench.results import KernelsReport, OpTime, Peaks, Slice, StepCase
from sinterlm.bench.setup import (
    Tell,
    machine_facts,
    model_facts,
    open_recording,
    peaks_around,
    probe,
    random_prompts,
)
from sinterlm.engine.llm import LLM
from sinterlm.engine.sampling import SamplingParams
from sinterlm.errors import ResourceError
from sinterlm.options import EngineOptions
from sinterlm.runtime.roofline import OpLoad, batch_loads, fraction

#: ``Model.step`` outside the ops: structs, the C call, checks of arguments, tokens of slots.
CALL = "call around the ops"
#: Decode steps before the clock starts: pages, arrays and the branch predictor settle.
WARM_UP = 2
#: Prefill steps before the clock starts, and timed ones per round: they are long by themselves.
PREFILL_WARM_UP, PREFILL_STEPS = 1, 2


@dataclass(frozen=True)
class Shape:
    """The steps of one case: ``num_seqs`` sequences that decode after ``context_len`` tokens, or
    with ``is_prefill`` one whole prompt of ``context_len`` tokens."""

    num_seqs: int
    context_len: int
    is_prefill: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens computed per step."""
        return self.context_len if self.is_prefill else self.num_seqs


@dataclass(frozen=True)
class Plan:
    """What is run."""

    shapes: tuple[Shape, ...]
    num_steps: int  #: decode steps timed per round
    rounds: int

    def longest(self, shape: Shape) -> int:
        """Most tokens of a sequence of ``shape``, those it draws included."""
        return shape.context_len + (1 if shape.is_prefill else WARM_UP + self.num_steps + 2)


@dataclass(frozen=True)
class _Run:
    """Timed steps of one shape; seconds over all of them."""

    wall_s: float
    native_s: float  #: inside ``Model.step``
    counters: dict[str, tuple[int, int]]  #: kind of op -> (calls, nanoseconds)
    records: list[StepRecord]
    python: list[Slice]  #: per step


def measure_kernels(
    bundle: Bundle, options: EngineOptions, plan: Plan, tell: Tell
) -> KernelsReport:
    """Run ``plan`` on ``bundle``. Raises ResourceError where its KV cache does not fit, and as
    ``LLM`` does."""
    with open_recording(bundle, options) as (llm, model):
        tell("fill the KV cache")
        model.fill_kv(_pages_needed(llm, options, plan))
        probes: list[Peaks] = []
        runs: list[list[_Run]] = [[] for _ in plan.shapes]
        for number in range(plan.rounds):
            for case, shape in enumerate(plan.shapes):
                tell(f"round {number + 1}/{plan.rounds}, {shape.num_tokens} tokens a step")
                probes.append(probe(model))
                runs[case].append(_run(llm, model, options, shape, plan.num_steps))
        probes.append(probe(model))
        cases = [
            _case(bundle.manifest, shape, runs[case], peaks_around(probes, case, len(runs)))
            for case, shape in enumerate(plan.shapes)
        ]
        return KernelsReport(machine_facts(), model_facts(bundle, model), probes, cases)


def _pages_needed(llm: LLM, options: EngineOptions, plan: Plan) -> int:
    """KV pages of the largest shape. Raises ResourceError when there are fewer."""
    size = options.block_size
    needed = max(shape.num_seqs * -(-plan.longest(shape) // size) for shape in plan.shapes)
    if needed > llm.plan.num_pages:
        raise ResourceError(
            f"these shapes need {needed} KV pages of {llm.plan.page_bytes / 1e6:.1f} MB and there "
            f"is room for {llm.plan.num_pages}; give a smaller --context or --batch-sizes"
        )
    return needed


def _run(
    llm: LLM, model: RecordingModel, options: EngineOptions, shape: Shape, num_steps: int
) -> _Run:
    """Prepare the sequences of ``shape``, warm up, and time ``num_steps`` steps, or prefills."""
    engine = PhasedEngine(
        llm,
        model,
        page_tokens=options.block_size,
        max_num_seqs=shape.num_seqs,
        # All prompts in one step: a decode case pretends that one, a prefill case has one prompt.
        max_num_batched_tokens=shape.num_seqs * shape.context_len,
    )
    try:
        if shape.is_prefill:
            for number in range(PREFILL_WARM_UP + PREFILL_STEPS):
                _submit(engine, shape, 1, number)  # there is one seat: a step takes one of them
            return _timed(engine, model, PREFILL_WARM_UP, PREFILL_STEPS)
        _submit(engine, shape, WARM_UP + num_steps + 2, 0)
        with model.pretending():
            engine.step()
        return _timed(engine, model, WARM_UP, num_steps)
    finally:
        engine.close()


def _submit(engine: PhasedEngine, shape: Shape, max_tokens: int, number: int) -> None:
    """Queue one request per sequence; their text is wanted as it appears, as when serving."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    vocab_size = engine.limits.vocab_size
    prompts = random_prompts(shape.num_seqs, shape.context_len, vocab_size, seed=number)
    for index, ids in enumerate(prompts):
        engine.add_request(f"{number}-{index}", ids, params, stream=True)


def _timed(engine: PhasedEngine, model: RecordingModel, warm_up: int, num_steps: int) -> _Run:
    for _ in range(warm_up):
        engine.step()
    phases = engine.phases
    phases.clear()
    before = model.op_counters()
    with model.recording() as records:
        start = time.perf_counter()
        for _ in range(num_steps):
            engine.step()
        wall = time.perf_counter() - start
    counters = {
        name: (calls - before[name][0], ns - before[name][1])
        for name, (calls, ns) in model.op_counters().items()
    }
    native = sum(record.end - record.start for record in records)
    # Making a record is no part of any step.
    noting = phases.parts["step"] - native
    phases.parts["step"] = native
    phases.engine_s -= noting
    wall -= noting
    return _Run(wall, native, counters, records, phases.python_slices(wall, num_steps))


def _case(
    manifest: Manifest, shape: Shape, runs: Sequence[_Run], around: Sequence[Peaks]
) -> StepCase:
    """The round of median step time; ``around`` is the machine around each round."""
    rounds = [run.wall_s / len(run.records) for run in runs]
    step_s = median_low(rounds)
    run, peaks = runs[rounds.index(step_s)], around[rounds.index(step_s)]
    num_steps = len(run.records)
    ops = op_times(manifest, run.records, run.counters, peaks)
    native = run.native_s / num_steps - sum(op.seconds for op in ops)
    roof = sum(op.roof_s for op in ops)
    return StepCase(
        kind="prefill" if shape.is_prefill else "decode",
        num_seqs=shape.num_seqs,
        num_tokens=shape.num_tokens,
        context_len=int(run.records[0].context_lens[0]),
        num_steps=num_steps,
        rounds_s=rounds,
        step_s=step_s,
        roof_s=roof,
        fraction=fraction(roof, step_s),
        peaks=peaks,
        ops=ops,
        budget=[*(Slice(op.name, op.seconds) for op in ops), Slice(CALL, native), *run.python],
    )


def op_times(
    manifest: Manifest,
    records: Sequence[StepRecord],
    counters: dict[str, tuple[int, int]],
    peaks: Peaks,
) -> list[OpTime]:
    """Each kind of op with what it moved and computed in ``records``, per step, worst first."""
    loads: dict[str, list[OpLoad]] = {name: [] for name in counters}
    for record in records:
        for load in batch_loads(manifest.ops, manifest.constants.windows, record.sequences()):
            loads[load.name].append(load)
    times = [
        _op_time(name, loads[name], counters[name], len(records), peaks)
        for name in counters
        if counters[name][0] > 0
    ]
    return sorted(times, key=lambda op: op.lost_s, reverse=True)


def _op_time(
    name: str, loads: Sequence[OpLoad], counter: tuple[int, int], num_steps: int, peaks: Peaks
) -> OpTime:
    slopes = (peaks.bytes_per_s, peaks.flops_per_s)
    seconds = counter[1] * 1e-9 / num_steps
    nbytes = sum(load.nbytes for load in loads) / num_steps
    flops = sum(load.flops for load in loads) / num_steps
    roof = sum(load.seconds(*slopes) for load in loads) / num_steps
    bound = "memory" if nbytes / slopes[0] >= flops / slopes[1] else "compute"
    return OpTime(
        name=name,
        calls=counter[0] / num_steps,
        seconds=seconds,
        nbytes=nbytes,
        flops=flops,
        bytes_per_s=nbytes / seconds,
        flops_per_s=flops / seconds,
        roof_s=roof,
        fraction=fraction(roof, seconds),
        bound=bound,
    )
