"""How much KV cache there is, and what is refused before anything is read."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from sinterlm.artifact.manifest import ModelShape, kv_token_bytes
from sinterlm.engine.memory import check_options, check_target, plan_kv
from sinterlm.errors import ResourceError, UsageError
from sinterlm.options import EngineOptions
from sinterlm.runtime.device_probe import DeviceMemory

GB = 10**9
#: 2 * 32 layers * 8 heads * 128 * 2 bytes = 131072 bytes per token.
PER_TOKEN = 131072
SHAPE = ModelShape("Llama", 128256, 4096, 32, 32, 8, 128, 14336)


def manifest(max_model_len: int = 32768, weights: int = 16 * GB, kv: str = "bf16") -> Any:
    return SimpleNamespace(
        target="cpu",
        shape=SHAPE,
        kv_bytes_per_token=kv_token_bytes(SHAPE, kv),
        max_model_len=max_model_len,
        weights=SimpleNamespace(nbytes=weights),
        activation_bytes_per_token=100_000,
        activation_bytes_per_row=520_000,
    )


def on_gpu(weights: int = 16 * GB) -> Any:
    given = manifest(weights=weights)
    given.target = "gfx942"
    return given


def test_of_a_device(caplog: pytest.LogCaptureFixture) -> None:
    """A share of all its memory, less weights and working buffers; this machine's counts not."""
    plan = plan_kv(on_gpu(), EngineOptions(kv_cache_memory_bytes=100 * GB), GB)
    assert 99 * GB < plan.kv_bytes <= 100 * GB
    device = DeviceMemory(free=79 * GB, total=80 * GB, workspace=2 * GB)
    page = 64 * PER_TOKEN
    for share, want in ((None, 72 - 18), (0.5, 40 - 18)):
        options = EngineOptions(gpu_memory_utilization=share)
        assert plan_kv(on_gpu(), options, GB, device).num_pages == want * GB // page
    assert (
        "up to 22.00 GB of the device's 80.00 GB for the KV cache, beside 16.00 GB of weights"
        in (caplog.text)
    )


def test_a_device_that_has_not_the_memory() -> None:
    device = DeviceMemory(free=60 * GB, total=80 * GB, workspace=2 * GB)
    with pytest.raises(ResourceError, match=r"0.9 is 72.00 GB .* 60.00 GB are free; .* most 0.75"):
        plan_kv(on_gpu(), EngineOptions(), GB, device)
    some = EngineOptions(gpu_memory_utilization=0.75)
    assert plan_kv(on_gpu(), some, GB, device).kv_bytes > 41 * GB
    with pytest.raises(ResourceError, match=r"58.00 GB of weights .* leave nothing of 60.00 GB"):
        plan_kv(on_gpu(58 * GB), some, GB, device)
    with pytest.raises(ResourceError, match="raise gpu_memory_utilization"):
        long = EngineOptions(gpu_memory_utilization=0.75, max_model_len=32768)
        plan_kv(on_gpu(57 * GB), long, GB, device)


def test_shares_are_of_one_kind_of_memory() -> None:
    gpu, cpu = EngineOptions(gpu_memory_utilization=0.5), EngineOptions(kv_cache_memory_fraction=1)
    check_target(gpu, "gfx942")
    check_target(cpu, "cpu")
    with pytest.raises(UsageError, match="give kv_cache_memory_fraction"):
        check_target(gpu, "cpu")
    with pytest.raises(UsageError, match="give gpu_memory_utilization"):
        check_target(cpu, "gfx942")
    for wrong in (0, 1.5, True, "1"):
        with pytest.raises(UsageError, match=r"gpu_memory_utilization=.* above 0"):
            check_options(EngineOptions(gpu_memory_utilization=wrong))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="exclude each other"):
        check_options(EngineOptions(gpu_memory_utilization=0.5, kv_cache_memory_bytes=1))


def test_capped_at_what_can_be_used() -> None:
    plan = plan_kv(manifest(max_model_len=1000), EngineOptions(max_num_seqs=3), 10**15)
    assert plan.max_model_len == 1000 and plan.num_pages == 3 * 16
    assert plan.page_bytes == 64 * PER_TOKEN and plan.kv_bytes == 48 * 64 * PER_TOKEN


def test_taken_from_what_is_free() -> None:
    available = 40 * GB
    plan = plan_kv(manifest(), EngineOptions(), available)
    assert 0.85 * 24 * GB < plan.kv_bytes < 0.95 * 24 * GB
    smaller = plan_kv(manifest(), EngineOptions(), available - GB)
    assert smaller.num_pages < plan.num_pages
    wide, coded = (plan_kv(manifest(kv=k), EngineOptions(), available) for k in ("fp32", "int8"))
    assert wide.page_bytes == 2 * plan.page_bytes
    assert coded.page_bytes == 64 * 2 * 32 * 8 * (128 + 4)
    assert coded.num_pages == pytest.approx(plan.num_pages * 256 / 132, rel=1e-3)


def test_explicit_size_is_what_is_taken() -> None:
    options = EngineOptions(kv_cache_memory_bytes=5 * GB)
    plan = plan_kv(manifest(), options, 40 * GB)
    assert plan.num_pages == 5 * GB // (64 * PER_TOKEN)


def test_a_fraction_is_of_what_weights_leave() -> None:
    half = plan_kv(manifest(), EngineOptions(kv_cache_memory_fraction=0.5), 40 * GB)
    whole = plan_kv(manifest(), EngineOptions(kv_cache_memory_fraction=1), 40 * GB)
    assert 0.85 * 24 * GB / 2 < half.kv_bytes < 24 * GB / 2
    assert abs(2 * half.num_pages - whole.num_pages) <= 1


def test_weights_that_do_not_fit() -> None:
    with pytest.raises(ResourceError, match=r"16\.00 GB of weights.*15\.00 GB of memory left"):
        plan_kv(manifest(), EngineOptions(), 15 * GB)
    with pytest.raises(ResourceError, match=r"5\.00 GB of KV cache"):
        plan_kv(manifest(), EngineOptions(kv_cache_memory_bytes=5 * GB), 20 * GB)


def test_context_that_was_asked_for_is_met_or_refused() -> None:
    options = EngineOptions(max_model_len=32768)
    with pytest.raises(ResourceError, match=r"32768 tokens needs 4\.29 GB.* lower max_model_len"):
        plan_kv(manifest(), options, 18 * GB)
    assert plan_kv(manifest(), options, 24 * GB).max_model_len == 32768
    with pytest.raises(UsageError, match="max_model_len=32769 exceeds the 32768"):
        plan_kv(manifest(), EngineOptions(max_model_len=32769), 10**15)


def test_context_left_open_is_what_fits_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sinterlm"):
        plan = plan_kv(manifest(), EngineOptions(), 18 * GB)
    assert 256 <= plan.max_model_len < 32768
    assert plan.max_model_len == plan.num_pages * 64
    assert str(plan.max_model_len) in caplog.text
    caplog.clear()
    plan_kv(manifest(), EngineOptions(), 10**15)
    assert caplog.text == ""


def test_next_to_nothing_is_refused() -> None:
    with pytest.raises(ResourceError, match=r"KV cache.*raise kv_cache_memory_bytes"):
        plan_kv(manifest(), EngineOptions(kv_cache_memory_bytes=64 * PER_TOKEN), 40 * GB)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_model_len": 1}, "max_model_len=1 "),
        ({"max_model_len": True}, "max_model_len=True"),
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"max_num_seqs": 600}, "max_num_seqs=600 exceeds max_num_batched_tokens=512"),
        ({"max_num_batched_tokens": -1}, "max_num_batched_tokens=-1"),
        ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes=0"),
        ({"kv_cache_memory_bytes": "4G"}, "kv_cache_memory_bytes='4G'"),
        ({"kv_cache_memory_fraction": 0.0}, "kv_cache_memory_fraction=0.0 must be above 0"),
        ({"kv_cache_memory_fraction": 1.1}, "kv_cache_memory_fraction=1.1 must be"),
        ({"kv_cache_memory_fraction": float("nan")}, "kv_cache_memory_fraction=nan must be"),
        ({"kv_cache_memory_fraction": 0.5, "kv_cache_memory_bytes": 9}, "exclude each other"),
        ({"block_size": 24}, "block_size=24 must be a multiple of 16"),
        ({"block_size": 0}, "block_size=0"),
        ({"num_threads": 0}, "num_threads=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": None}, "seed=None"),
        ({"cpu_ids": (-1,)}, "cpu_ids names -1"),
        ({"cpu_ids": ("a",)}, "cpu_ids names 'a'"),
        ({"cpu_ids": ()}, "cpu_ids is empty"),
        ({"cpu_ids": (0, 1), "num_threads": 3}, "cpu_ids names 2 CPUs and num_threads=3"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_options(EngineOptions(**options))


def test_good_options() -> None:
    check_options(EngineOptions())
    check_options(EngineOptions(cpu_ids=(0, 1), num_threads=2, block_size=128, max_model_len=2))
