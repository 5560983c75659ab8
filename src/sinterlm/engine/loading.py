"""From an opened bundle to a model in memory and the engine that runs it.

Refuses, before any weight is read, what memory does not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from sinterlm.artifact.bundle import Bundle
from sinterlm.artifact.env import env_int
from sinterlm.engine.admission import Limits
from sinterlm.engine.engine import Engine
from sinterlm.engine.memory import KvPlan, check_target, plan_kv, sample_rows
from sinterlm.engine.sampling import SamplingParams, default_sampling_params
from sinterlm.engine.schedule import StepLimits
from sinterlm.engine.speculation import NgramProposer
from sinterlm.engine.tokenizer import Tokenizer
from sinterlm.errors import BundleError, UsageError
from sinterlm.options import EngineOptions
from sinterlm.runtime.device_probe import DeviceMemory, device_memory
from sinterlm.runtime.machine import Machine, read_machine
from sinterlm.runtime.model import Model


@dataclass(frozen=True)
class Loaded:
    """A model in memory and what stands around it."""

    plan: KvPlan
    tokenizer: Tokenizer
    defaults: SamplingParams  #: the checkpoint's own, over ours
    model: Model
    engine: Engine


def load_bundle(bundle: Bundle, options: EngineOptions, open_model: Callable[..., Model]) -> Loaded:
    """Load a bundle. ``open_model`` is called as ``runtime.model.Model`` is.

    Raises BundleError for one without weights, ResourceError when memory does not suffice.
    """
    manifest, machine = bundle.manifest, read_machine()
    if manifest.weights is None:
        raise BundleError(
            "this bundle holds code alone, no weights; compile the model without --code-only"
        )
    check_target(options, manifest.target)
    plan = plan_kv(manifest, options, machine.memory_available, _device(bundle, options))
    tokenizer = Tokenizer(bundle.text())
    defaults = default_sampling_params(tokenizer.assets.generation)
    threads, cpu_ids = _workers(options, machine)
    model = open_model(
        bundle,
        num_threads=threads,
        cpu_ids=cpu_ids,
        max_tokens=options.max_num_batched_tokens,
        max_seqs=options.max_num_seqs,
        max_sample_rows=plan.max_sample_rows,
        max_model_len=plan.max_model_len,
    )
    try:
        model.alloc_kv(plan.num_pages, options.block_size)
    except BaseException:
        model.close()
        raise
    engine = Engine(
        model,
        tokenizer,
        Limits(plan.max_model_len, manifest.shape.vocab_size),
        StepLimits(
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_sample_rows=plan.max_sample_rows,
            max_mixed_prefill_tokens=_mixed_prefill_tokens(bundle, options),
            num_scheduler_steps=options.num_scheduler_steps,
        ),
        num_pages=plan.num_pages,
        page_tokens=options.block_size,
        prefix_caching=options.enable_prefix_caching,
        proposer=_proposer(options),
        seed=options.seed,
    )
    return Loaded(plan, tokenizer, defaults, model, engine)


def _mixed_prefill_tokens(bundle: Bundle, options: EngineOptions) -> int:
    """What is asked for, else what keeps a step short: with AMX a prompt takes a fraction."""
    if options.max_mixed_prefill_tokens is not None:
        return options.max_mixed_prefill_tokens
    return 512 if bundle.manifest.isa == "amx" else 256


def _device(bundle: Bundle, options: EngineOptions) -> DeviceMemory | None:
    """The device's memory, where the KV cache's size follows from it."""
    if bundle.manifest.target == "cpu" or options.kv_cache_memory_bytes is not None:
        return None
    return device_memory(
        bundle.library_path,
        max_tokens=options.max_num_batched_tokens,
        max_seqs=options.max_num_seqs,
        max_sample_rows=sample_rows(options),
        max_model_len=options.max_model_len or bundle.manifest.max_model_len,
    )


def _proposer(options: EngineOptions) -> NgramProposer | None:
    if options.num_speculative_tokens == 0:
        return None
    return NgramProposer(
        options.num_speculative_tokens,
        shortest=options.prompt_lookup_min,
        longest=options.prompt_lookup_max,
    )


def _workers(options: EngineOptions, machine: Machine) -> tuple[int, tuple[int, ...] | None]:
    """How many workers, and the CPU of each. One worker for every CPU is pinned unless told
    otherwise: the scheduler may stack workers that sleep at barriers on one CPU. With fewer, which
    CPUs are free is the scheduler's knowledge."""
    asked = options.num_threads or len(options.cpu_ids or ())
    threads = asked or env_int("SINTERLM_NUM_THREADS") or machine.num_cpus
    whole = threads == len(machine.cpu_ids) > 1
    return threads, options.cpu_ids or (machine.cpu_ids if whole else None)


def cpu_ids_from(given: object) -> tuple[int, ...] | None:
    """The ``cpu_ids`` that a caller gave. Raises UsageError for what is no list."""
    if given is None:
        return None
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise UsageError(f"cpu_ids={given!r} must be a list of CPU numbers")
    return tuple(given)


def folder_from(name: str, given: str | Path) -> Path:
    """The folder that a caller gave as ``name``. Raises UsageError for what is none."""
    # Path("") is the working directory: nobody who passes an empty text means that.
    if given == "" or not isinstance(given, str | Path):
        raise UsageError(f"{name}={given!r} must be a folder")
    return Path(given)
