"""How much KV cache an engine gets, decided from the manifest before any weight is read.

Refuses, with the numbers, what cannot fit; never lets the kernel find out later.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from sinterlm.artifact.manifest import Manifest
from sinterlm.errors import ResourceError, UsageError
from sinterlm.options import EngineOptions
from sinterlm.runtime.device_probe import DeviceMemory

#: Interpreter, tokenizer and batch arrays.
_RESERVE_BYTES = 128 << 20
#: Share of what is left that the cache may take; the rest is for whatever else grows.
_KV_SHARE = 0.9
#: Share of a GPU's memory that all of an engine may take, as vLLM has it.
_GPU_SHARE = 0.9
#: An engine that chose its context itself does not start with less than this many tokens.
_LEAST_CONTEXT = 256
#: Rows whose logits one step can give beside the drawn ones: prompt logprobs, evaluation.
_LOGITS_ROWS = 64


@dataclass(frozen=True)
class KvPlan:
    """Sizes of one engine, every "auto" resolved."""

    max_model_len: int  #: tokens
    max_sample_rows: int
    num_pages: int
    page_bytes: int

    @property
    def kv_bytes(self) -> int:
        """Bytes of the whole cache."""
        return self.num_pages * self.page_bytes


def check_options(options: EngineOptions) -> None:
    """Raise UsageError naming the first option that makes no sense by itself."""
    bounds: list[tuple[str, object, int, int]] = [
        ("max_model_len", options.max_model_len, 2, 1 << 24),
        ("max_num_seqs", options.max_num_seqs, 1, 4096),
        ("max_num_batched_tokens", options.max_num_batched_tokens, 1, 1 << 18),
        ("max_mixed_prefill_tokens", options.max_mixed_prefill_tokens, 1, 1 << 18),
        ("num_scheduler_steps", options.num_scheduler_steps, 1, 1024),
        ("num_speculative_tokens", options.num_speculative_tokens, 0, 64),
        ("prompt_lookup_min", options.prompt_lookup_min, 1, 1 << 10),
        ("prompt_lookup_max", options.prompt_lookup_max, 1, 1 << 10),
        ("kv_cache_memory_bytes", options.kv_cache_memory_bytes, 1, 1 << 62),
        ("block_size", options.block_size, 16, 4096),
        ("num_threads", options.num_threads, 1, 1024),
        ("seed", options.seed, 0, 2**64 - 1),
    ]
    for name, value, low, high in bounds:
        if value is None and name != "seed":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise UsageError(f"{name}={value!r} must be an integer between {low} and {high}")
    if options.block_size % 16:
        raise UsageError(f"block_size={options.block_size} must be a multiple of 16")
    if options.max_num_seqs > options.max_num_batched_tokens:
        raise UsageError(
            f"max_num_seqs={options.max_num_seqs} exceeds "
            f"max_num_batched_tokens={options.max_num_batched_tokens}; each sequence needs a token"
        )
    if options.prompt_lookup_min > options.prompt_lookup_max:
        raise UsageError(
            f"prompt_lookup_min={options.prompt_lookup_min} exceeds "
            f"prompt_lookup_max={options.prompt_lookup_max}"
        )
    if not isinstance(options.enable_prefix_caching, bool):
        raise UsageError(
            f"enable_prefix_caching={options.enable_prefix_caching!r} must be True or False"
        )
    _check_shares(options)
    _check_cpu_ids(options)


def _check_shares(options: EngineOptions) -> None:
    for name in ("kv_cache_memory_fraction", "gpu_memory_utilization"):
        share: object = getattr(options, name)
        if share is None:
            continue
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise UsageError(f"{name}={share!r} must be above 0, and 1 at most")
        if options.kv_cache_memory_bytes is not None:
            raise UsageError(
                f"{name}={share!r} and kv_cache_memory_bytes={options.kv_cache_memory_bytes} "
                "exclude each other; give one"
            )


def check_target(options: EngineOptions, target: str) -> None:
    """Raise UsageError for a share of memory that the target has not."""
    name, other = "kv_cache_memory_fraction", "gpu_memory_utilization"
    if target == "cpu":
        name, other = other, name
    if getattr(options, name) is not None:
        raise UsageError(
            f"{name}={getattr(options, name)!r} is not for --target {target}; give {other}"
        )


def sample_rows(options: EngineOptions) -> int:
    """Most rows that a step gives logits of."""
    drawn = options.max_num_seqs * (1 + options.num_speculative_tokens)
    return min(drawn + _LOGITS_ROWS, options.max_num_batched_tokens)


def _check_cpu_ids(options: EngineOptions) -> None:
    ids: tuple[object, ...] | None = options.cpu_ids
    for cpu in () if ids is None else ids:
        if isinstance(cpu, bool) or not isinstance(cpu, int) or not 0 <= cpu < 4096:
            raise UsageError(f"cpu_ids names {cpu!r}, which is no CPU number")
    if ids is not None and not ids:
        raise UsageError("cpu_ids is empty; name a CPU for each worker, or leave it out")
    if ids is not None and options.num_threads not in (None, len(ids)):
        raise UsageError(
            f"cpu_ids names {len(ids)} CPUs and num_threads={options.num_threads}; give as many"
        )


def plan_kv(
    manifest: Manifest,
    options: EngineOptions,
    available_bytes: int,
    device: DeviceMemory | None = None,
) -> KvPlan:
    """Pages for as much context as memory allows, never more than ``max_num_seqs`` full ones.

    A ``max_model_len`` that the user gave is met or refused; without one the longest context
    that fits is taken, up to the bundle's, and said in a warning when it is shorter. ``device`` is
    needed on a GPU unless the cache's bytes are given. Raises UsageError and ResourceError.
    """
    limit = manifest.max_model_len
    wanted = options.max_model_len or limit
    if wanted > limit:
        raise UsageError(f"max_model_len={wanted} exceeds the {limit} tokens of this model")
    rows = sample_rows(options)
    page_tokens = options.block_size
    page_bytes = page_tokens * manifest.kv_bytes_per_token
    if manifest.target == "cpu":
        budget = _kv_budget(manifest, options, available_bytes, rows)
    else:
        budget = _device_budget(manifest, options, device)
    pages_of_one = -(-wanted // page_tokens)
    num_pages = min(budget // page_bytes, options.max_num_seqs * pages_of_one)
    if num_pages < pages_of_one:
        fits = num_pages * page_tokens
        if options.max_model_len is not None or fits < min(limit, _LEAST_CONTEXT):
            more = "give the process more memory"
            for name in ("kv_cache_memory_bytes", "kv_cache_memory_fraction",
                         "gpu_memory_utilization"):  # fmt: skip
                if getattr(options, name) is not None:
                    more = f"raise {name}"
            raise ResourceError(
                f"one context of {wanted} tokens needs {_show(pages_of_one * page_bytes)} of KV "
                f"cache and {_show(budget)} can be had, enough for {fits} tokens; lower "
                f"max_model_len, or {more}"
            )
        logging.getLogger("sinterlm").warning(
            "memory leaves room for a context of %d tokens of this model's %d", fits, limit
        )
        wanted = fits
    return KvPlan(wanted, rows, num_pages, page_bytes)


def _kv_budget(manifest: Manifest, options: EngineOptions, available: int, rows: int) -> int:
    asked = options.kv_cache_memory_bytes
    weights = 0 if manifest.weights is None else manifest.weights.nbytes
    activations = (
        manifest.activation_bytes_per_token * options.max_num_batched_tokens
        + manifest.activation_bytes_per_row * rows
    )
    rope_table = (options.max_model_len or manifest.max_model_len) * manifest.shape.head_dim * 4
    working = activations + rope_table + _RESERVE_BYTES
    fixed = weights + working
    if fixed + (asked or 0) > available:
        cache = f" + {_show(asked)} of KV cache" if asked else ""
        raise ResourceError(
            f"{_show(weights)} of weights + {_show(working)} to work in"
            f"{cache} are more than the {_show(available)} of memory left to this process; free "
            "some, raise the container's limit, or choose a smaller model"
        )
    if asked is not None:
        return asked
    return int((available - fixed) * (options.kv_cache_memory_fraction or _KV_SHARE))


def _device_budget(manifest: Manifest, options: EngineOptions, device: DeviceMemory | None) -> int:
    if options.kv_cache_memory_bytes is not None:
        return options.kv_cache_memory_bytes
    assert device is not None, "whoever gives no bytes asks the driver"
    share = options.gpu_memory_utilization or _GPU_SHARE
    wanted = int(device.total * share)
    if wanted > device.free:
        raise ResourceError(
            f"gpu_memory_utilization={share} is {_show(wanted)} of the device's "
            f"{_show(device.total)}, and {_show(device.free)} are free; end what else runs there, "
            f"or give at most {100 * device.free // device.total / 100:.2f}"
        )
    weights = 0 if manifest.weights is None else manifest.weights.nbytes
    budget = wanted - weights - device.workspace
    beside = f"{_show(weights)} of weights and {_show(device.workspace)} to work in"
    if budget <= 0:
        raise ResourceError(
            f"{beside} leave nothing of {_show(wanted)} for the KV cache "
            f"(gpu_memory_utilization={share} of {_show(device.total)}); raise it, lower "
            "max_num_batched_tokens or max_num_seqs, or choose a smaller model"
        )
    logging.getLogger("sinterlm").warning(
        "up to %s of the device's %s for the KV cache, beside %s (gpu_memory_utilization=%s)",
        _show(budget), _show(device.total), beside, share,
    )  # fmt: skip
    return budget


def _show(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 10**9 else f"{nbytes / 1e6:.1f} MB"
