"""Measuring this machine with a compiled library: read bandwidth and the peak of its GEMM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sinterlm.errors import ResourceError
from sinterlm.options import CompileOptions, EngineOptions

if TYPE_CHECKING:
    from pathlib import Path

    from sinterlm.artifact.bundle import Bundle
    from sinterlm.engine.llm import LLM

#: Seconds of one measurement, beside the making of its buffer; it takes the best of many passes.
_PROBE_S = 0.5


def measure(llm: LLM) -> tuple[float, float]:
    """(GFLOP/s, GB/s) with the model's threads. Raises ResourceError for want of memory."""
    return llm.model.probe(_PROBE_S)


def probe_bundle(bundle: Bundle) -> tuple[float, float]:
    """Load ``bundle`` and measure; (GFLOP/s, GB/s). Raises as loading does."""
    from sinterlm.engine.llm import LLM

    with LLM.from_bundle(bundle, EngineOptions(max_num_seqs=1)) as llm:
        return measure(llm)


def self_test(config_dir: str, cache_dir: Path) -> tuple[float, float] | None:
    """Compile ``config_dir`` with random weights, draw tokens, measure; (GFLOP/s, GB/s).

    None where memory does not suffice to measure. Raises as compiling, loading and running do.
    """
    from sinterlm.commands.ui import TerminalProgress
    from sinterlm.compile import compile_model
    from sinterlm.engine.llm import LLM
    from sinterlm.engine.sampling import SamplingParams

    options = CompileOptions(config_dir, load_format="dummy", cache_dir=cache_dir)
    bundle = compile_model(options, TerminalProgress(quiet=True))
    with LLM.from_bundle(bundle, EngineOptions(max_num_seqs=1)) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        llm.generate([{"prompt_token_ids": [1, 2, 3]}], params)
        try:
            return measure(llm)
        except ResourceError:
            return None
