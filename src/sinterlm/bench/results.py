"""What the benchmarks measured, as plain data: raw numbers with the machine they were measured on.

Times are seconds, sizes bytes, rates per second. ``dataclasses.asdict`` of a report is its JSON.
A fraction of a roof that would not be credible is None (``roofline.MOST_CREDIBLE``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Peaks:
    """Slope and ceiling of the roofline, measured with the model's own workers."""

    bytes_per_s: float  #: of reading memory
    flops_per_s: float  #: of the library's GEMM instruction

    @classmethod
    def best(cls, probes: Sequence[Peaks]) -> Peaks:
        """The best of each."""
        return cls(max(p.bytes_per_s for p in probes), max(p.flops_per_s for p in probes))


@dataclass(frozen=True)
class MachineFacts:
    """Where and with what a benchmark ran."""

    cpu: str
    num_cpus: int  #: that this process may use
    cpu_quota: float | None  #: CPUs' worth of time, None = no limit
    memory_bytes: int  #: that this process may use
    system: str
    versions: dict[str, str]  #: of sinterlm, Python and NumPy


@dataclass(frozen=True)
class ModelFacts:
    """What ran."""

    model: str
    isa: str
    dtype: str  #: of the model, or how most of its weights are coded
    weights_bytes: int
    num_threads: int
    huge_pages: bool
    bundle_sha256: str


@dataclass(frozen=True)
class ThroughputCase:
    """``num_prompts`` equal requests, submitted at once; one sample per round, and medians."""

    num_prompts: int
    input_len: int
    output_len: int
    elapsed_s: list[float]
    ttft_s: list[float]  #: median over requests, from submission to the first token
    decode_step_s: list[float] | None  #: median inter-token latency while all decode together
    num_steps: list[int]
    roof_s: list[float]  #: least time of the same steps, by the better of the probes around
    fractions: list[float | None]  #: roof_s / elapsed_s
    total_tokens_per_s: float  #: median; input and output
    output_tokens_per_s: float  #: median
    median_ttft_s: float
    median_decode_step_s: float | None
    fraction: float | None  #: median; None when any round's is


@dataclass(frozen=True)
class ThroughputReport:
    """Everything of ``sinterlm bench throughput``."""

    machine: MachineFacts
    model: ModelFacts
    probes: list[Peaks]  #: one before each run and one after the last
    cases: list[ThroughputCase]


@dataclass(frozen=True)
class OpTime:
    """One kind of fused op in a step, all layers together; per step."""

    name: str
    calls: float
    seconds: float
    nbytes: float
    flops: float
    bytes_per_s: float
    flops_per_s: float
    roof_s: float
    fraction: float | None  #: roof_s / seconds
    bound: str  #: "memory" or "compute": what sets its roof

    @property
    def lost_s(self) -> float:
        """Time above the roof: what perfect code would save per step."""
        return self.seconds - self.roof_s


@dataclass(frozen=True)
class Slice:
    """One part of a step's time."""

    name: str
    seconds: float


@dataclass(frozen=True)
class StepCase:
    """Steps of one shape; figures are the means of the steps of the round of median step time."""

    kind: str  #: "decode" or "prefill"
    num_seqs: int
    num_tokens: int  #: computed per step
    context_len: int  #: tokens in the cache of each sequence after the first timed step
    num_steps: int  #: per round
    rounds_s: list[float]  #: seconds per step of each round
    step_s: float  #: median of rounds_s
    roof_s: float
    fraction: float | None
    peaks: Peaks  #: the better of the probes around that round
    ops: list[OpTime]  #: worst offenders (most time above the roof) first
    budget: list[Slice]  #: ops, the call around them, Python; adds up to step_s


@dataclass(frozen=True)
class KernelsReport:
    """Everything of ``sinterlm bench kernels``."""

    machine: MachineFacts
    model: ModelFacts
    probes: list[Peaks]
    cases: list[StepCase]


@dataclass(frozen=True)
class StartupReport:
    """Everything of ``sinterlm bench startup``: process start to first token, one per round."""

    machine: MachineFacts
    command: list[str]
    cold_s: list[float]  #: with an empty cache: compiling and packing included
    warm_s: list[float]  #: with the bundle in the cache
    median_cold_s: float
    median_warm_s: float
