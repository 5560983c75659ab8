"""Offline throughput: equal requests through ``LLM.generate``, against the roof of the same steps.

Rounds go through all cases in turn, a probe of the machine before each run, so that a machine
that changes under the benchmark changes both sides of every fraction.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

from sinterlm.artifact.bundle import Bundle
from sinterlm.artifact.manifest import Manifest
from sinterlm.bench.recording import RecordingModel, StepRecord
from sinterlm.bench.results import Peaks, ThroughputCase, ThroughputReport
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
from sinterlm.engine.prompts import TokensPrompt
from sinterlm.engine.sampling import SamplingParams
from sinterlm.errors import UsageError
from sinterlm.options import EngineOptions
from sinterlm.runtime.roofline import batch_loads, fraction, roof_seconds


@dataclass(frozen=True)
class Workload:
    """What is run: each count of ``num_prompts`` is a case."""

    num_prompts: tuple[int, ...]
    input_len: int  #: tokens
    output_len: int  #: tokens
    rounds: int
    seed: int = 0


@dataclass(frozen=True)
class _Run:
    """One run of one case."""

    elapsed_s: float
    ttft_s: float
    decode_step_s: float | None
    records: list[StepRecord]


def measure_throughput(
    bundle: Bundle, options: EngineOptions, work: Workload, tell: Tell
) -> ThroughputReport:
    """Run ``work`` on ``bundle``. Raises UsageError where it does not fit, and as ``LLM`` does."""
    with open_recording(bundle, options) as (llm, model):
        total = work.input_len + work.output_len
        if total > llm.max_model_len:
            raise UsageError(
                f"--input-len {work.input_len} and --output-len {work.output_len} are {total} "
                f"tokens, and the context is {llm.max_model_len}; give a --max-model-len of {total}"
            )
        tell("warm up")
        largest = work.num_prompts.index(max(work.num_prompts))
        _run(llm, model, replace(work, output_len=min(2, work.output_len)), largest)
        probes: list[Peaks] = []
        runs: list[list[_Run]] = [[] for _ in work.num_prompts]
        for number in range(work.rounds):
            for case in range(len(runs)):
                tell(f"round {number + 1}/{work.rounds}, {work.num_prompts[case]} prompts")
                probes.append(probe(model))
                runs[case].append(_run(llm, model, work, case, number))
        probes.append(probe(model))
        cases = [
            _case(bundle.manifest, work, case, runs[case], peaks_around(probes, case, len(runs)))
            for case in range(len(runs))
        ]
        return ThroughputReport(machine_facts(), model_facts(bundle, model), probes, cases)


def _run(llm: LLM, model: RecordingModel, work: Workload, case: int, number: int = 0) -> _Run:
    """All prompts of one case at once; prompts differ between rounds, and none was seen before."""
    llm.reset_prefix_cache()
    vocab_size = llm.bundle.manifest.shape.vocab_size
    ids = random_prompts(work.num_prompts[case], work.input_len, vocab_size, work.seed + number)
    prompts = [TokensPrompt(prompt_token_ids=one) for one in ids]
    params = SamplingParams(temperature=0.0, max_tokens=work.output_len, ignore_eos=True)
    with model.recording() as records:
        start = time.perf_counter()
        outputs = llm.generate(prompts, params)
        elapsed = time.perf_counter() - start
    first = [ttft for output in outputs if (ttft := output.metrics.ttft) is not None]
    return _Run(elapsed, median(first), decode_step(records), records)


def decode_step(records: Sequence[StepRecord]) -> float | None:
    """Median seconds from one step's end to the next one's, over the decode steps of the most
    sequences: the inter-token latency while all decode together. None without such a step."""
    most = max((r.num_seqs for r in records if r.is_decode), default=0)
    gaps = [
        after.end - before.end
        for before, after in pairwise(records)
        if after.is_decode and after.num_seqs == most
    ]
    return median(gaps) if gaps else None


def roof_of(manifest: Manifest, records: Sequence[StepRecord], peaks: Peaks) -> float:
    """The least seconds that the recorded steps can take, summed over steps."""
    windows = manifest.constants.windows
    return sum(
        roof_seconds(
            batch_loads(manifest.ops, windows, record.sequences()),
            peaks.bytes_per_s,
            peaks.flops_per_s,
        )
        for record in records
    )


def _case(
    manifest: Manifest, work: Workload, case: int, runs: Sequence[_Run], around: Sequence[Peaks]
) -> ThroughputCase:
    num_prompts = work.num_prompts[case]
    elapsed = [run.elapsed_s for run in runs]
    roofs = [roof_of(manifest, run.records, peaks) for run, peaks in zip(runs, around, strict=True)]
    fractions = [fraction(roof, took) for roof, took in zip(roofs, elapsed, strict=True)]
    known = [one for one in fractions if one is not None]
    decodes = [run.decode_step_s for run in runs if run.decode_step_s is not None]
    typical = median(elapsed)
    return ThroughputCase(
        num_prompts=num_prompts,
        input_len=work.input_len,
        output_len=work.output_len,
        elapsed_s=elapsed,
        ttft_s=[run.ttft_s for run in runs],
        decode_step_s=decodes or None,
        num_steps=[len(run.records) for run in runs],
        roof_s=roofs,
        fractions=fractions,
        total_tokens_per_s=num_prompts * (work.input_len + work.output_len) / typical,
        output_tokens_per_s=num_prompts * work.output_len / typical,
        median_ttft_s=median(run.ttft_s for run in runs),
        median_decode_step_s=median(decodes) if decodes else None,
        fraction=median(known) if len(known) == len(fractions) else None,
    )
