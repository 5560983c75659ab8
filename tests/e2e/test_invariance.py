"""A request's tokens and logprobs do not depend on what runs beside it, bit for bit.

Whatever the order of arrival, the chunking of prefills, the page size, preemptions, pages shared
with others, guesses, and the number of threads. A library whose sums are ordered differently at one
row than at many must be caught.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from sinterlm import LLM
from tests.e2e.damage import edit_config
from tests.e2e.replay import NUM_REQUESTS, Ask, alone, make_asks, make_repetitive_asks, replay
from tests.e2e.support import MODELS, copy_model

#: One with yarn rope, 7 heads per KV head and biases; one with a window and head_dim 80. Each as it
#: is, and with matrices or the KV cache in codes.
MODELS_REPLAYED = ("qwen2-yarn-gqa7", "mistral-window")
CASES_IN_CODES = ("qwen2-yarn-gqa7 int8", "mistral-window int4")
KV_IN_CODES = "mistral-window kv8"
EVERY_CASE = pytest.mark.parametrize(
    "model",
    [
        *MODELS_REPLAYED,
        KV_IN_CODES,
        *(pytest.param(case, marks=pytest.mark.slow) for case in CASES_IN_CODES),
    ],
)
LONGEST = 600  #: tokens of prompt and answer together: attention walks three chunks of 256
REPLAYS = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),  # a failure is reported as found: shrinking replays for minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

References = Callable[[str], tuple[list[Ask], list[bytes]]]

schedules = st.fixed_dictionaries(
    {
        "arrivals": st.lists(
            st.one_of(st.just(0), st.integers(0, 60)), min_size=NUM_REQUESTS, max_size=NUM_REQUESTS
        ),
        "max_num_batched_tokens": st.sampled_from([24, 33, 64, 200, 512]),
        "max_mixed_prefill_tokens": st.sampled_from([16, 50, 512]),
        "enable_prefix_caching": st.booleans(),
        "num_speculative_tokens": st.sampled_from([0, 3]),
        "num_scheduler_steps": st.sampled_from([1, 3, 8]),
        "max_num_seqs": st.sampled_from([2, 5, 20]),
        "block_size": st.sampled_from([16, 32, 64]),
        "num_threads": st.sampled_from([1, 2, 3, 7, 16]),
        "spare_pages": st.sampled_from([0, 1, 100]),
    }
)


def _config(model: str) -> dict[str, Any]:
    return json.loads((MODELS / model.partition(" ")[0] / "config.json").read_text())


def _dtypes(model: str) -> dict[str, Any]:
    if model == KV_IN_CODES:
        return {"dtype": "bf16", "kv_cache_dtype": "int8"}
    return {"dtype": "bf16", "quantization": model.partition(" ")[2] or None}


@cache
def _bytes_per_token(model: str) -> int:
    config = _config(model)
    heads = config["num_hidden_layers"] * config["num_key_value_heads"]
    head = config["head_dim"] + 4 if model == KV_IN_CODES else config["head_dim"] * 2
    return heads * head * 2  # K and V


def _kv_bytes(model: str, block_size: int, spare_pages: int) -> int:
    """Room for the longest request, and ``spare_pages`` more."""
    pages = -(-LONGEST // block_size) + spare_pages
    return pages * block_size * _bytes_per_token(model)


def _open(
    model: str, folders: dict[str, Path], cache_dir: Path, schedule: dict[str, object]
) -> LLM:
    options = {k: v for k, v in schedule.items() if k not in ("arrivals", "spare_pages")}
    kv_bytes = _kv_bytes(model, int(schedule["block_size"]), int(schedule["spare_pages"]))
    return LLM(
        folders[model], cache_dir=cache_dir, max_model_len=LONGEST + 1,
        kv_cache_memory_bytes=kv_bytes, **_dtypes(model), **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The golden checkpoints with a longer context, which is data: the code stays the same."""
    out = {}
    for model in MODELS_REPLAYED:
        out[model] = copy_model(model, tmp_path_factory.mktemp("long"))
        edit_config(max_position_embeddings=1024)(out[model])
    return out | {case: out[case.partition(" ")[0]] for case in (*CASES_IN_CODES, KV_IN_CODES)}


@pytest.fixture(scope="module")
def references(folders: dict[str, Path], cache_dir: Path) -> References:
    """Of a model: the requests, and the bytes of each when it runs alone on one thread."""

    @cache
    def reference(model: str) -> tuple[list[Ask], list[bytes]]:
        asks = make_asks(_config(model)["vocab_size"], LONGEST, seed=5)
        with LLM(
            folders[model], cache_dir=cache_dir, num_threads=1, kv_cache_memory_bytes=8 << 20,
            enable_prefix_caching=False, num_scheduler_steps=1, **_dtypes(model),
        ) as llm:  # fmt: skip
            return asks, alone(llm, asks)

    return reference


@EVERY_CASE
def test_alone_twice_is_the_same(
    model: str, references: References, folders: dict[str, Path], cache_dir: Path
) -> None:
    asks, expected = references(model)
    with LLM(folders[model], cache_dir=cache_dir, num_threads=2, **_dtypes(model)) as llm:
        assert alone(llm, asks) == expected
        assert llm._engine.stats().prefix_cache_hits > 0
        assert alone(llm, asks) == expected, "every prompt found in the cache"
    assert len(set(expected)) == NUM_REQUESTS, "twenty different requests"


@EVERY_CASE
@REPLAYS
@given(schedule=schedules)
def test_any_schedule_gives_the_bytes_of_running_alone(
    model: str,
    schedule: dict[str, object],
    references: References,
    folders: dict[str, Path],
    cache_dir: Path,
) -> None:
    asks, expected = references(model)
    with _open(model, folders, cache_dir, schedule) as llm:
        got = replay(llm._engine, asks, schedule["arrivals"])  # type: ignore[arg-type]
        stats = llm._engine.stats()
    event(f"preempted: {stats.num_preemptions > 0}")
    event(f"found in the cache: {stats.prefix_cache_hits > 0}")
    event(f"guessed right: {stats.spec_accepted_tokens > 0}")
    assert (stats.prefix_cache_hits > 0) <= bool(schedule["enable_prefix_caching"])
    wrong = [i for i in range(NUM_REQUESTS) if got[i] != expected[i]]
    assert not wrong, f"requests {wrong} changed under {schedule}"


@pytest.mark.parametrize("model", MODELS_REPLAYED)
def test_right_guesses_change_nothing(
    model: str, folders: dict[str, Path], cache_dir: Path
) -> None:
    """Answers that repeat themselves and their prompt: greedy, sampled, and with penalties."""
    asks = make_repetitive_asks()
    options = {"dtype": "bf16", "cache_dir": cache_dir, "kv_cache_memory_bytes": 8 << 20}
    with LLM(folders[model], num_threads=1, **options) as llm:  # type: ignore[arg-type]
        expected = alone(llm, asks)
    for width in (1, 4, 9):
        with LLM(
            folders[model], num_threads=2, num_speculative_tokens=width, prompt_lookup_min=1,
            **options,  # type: ignore[arg-type]
        ) as llm:  # fmt: skip
            assert replay(llm._engine, asks, [0, 3, 5, 0, 7, 0]) == expected
            stats = llm._engine.stats()
        assert 0 < stats.spec_accepted_tokens < stats.spec_draft_tokens
        assert stats.steps < sum(ask.params.max_tokens or 0 for ask in asks)


def test_tiny_pool_preempts(
    references: References, folders: dict[str, Path], cache_dir: Path
) -> None:
    """The schedules above do reach preemption and recompute."""
    model, preemptions = MODELS_REPLAYED[0], 0
    asks, expected = references(model)
    for apart in (1, 2, 3, 5):  # steps between two arrivals
        schedule: dict[str, object] = {
            "max_num_batched_tokens": 64, "max_num_seqs": 20, "block_size": 16, "num_threads": 2,
            "spare_pages": 0,
        }  # fmt: skip
        with _open(model, folders, cache_dir, schedule) as llm:
            got = replay(llm._engine, asks, [apart * i for i in range(NUM_REQUESTS)])
            preemptions += llm._engine.stats().num_preemptions
        assert got == expected
    assert preemptions > 0


@pytest.fixture(scope="module")
def mutant_cache(cache_dir: Path) -> Iterator[Path]:
    """A cache of libraries whose one-row products keep two chains per sum."""
    mutants = cache_dir.with_name(cache_dir.name + "-mutants")
    with pytest.MonkeyPatch.context() as patch:
        compiler = next(filter(shutil.which, ("g++", "clang++")))
        patch.setenv("SINTERLM_CXX", f"{compiler} -DSL_MUTATE_K_UNROLL=1")
        yield mutants


def test_unrolled_k_is_noticed(
    references: References, folders: dict[str, Path], mutant_cache: Path
) -> None:
    """A second accumulator at one row is all it takes: the comparison above must see it."""
    model = MODELS_REPLAYED[0]
    asks, sound = references(model)
    schedule: dict[str, object] = {
        "max_num_batched_tokens": 512, "max_num_seqs": 20, "block_size": 64, "num_threads": 1,
        "spare_pages": 100,
    }  # fmt: skip
    with _open(model, folders, mutant_cache, schedule) as llm:
        one_by_one = alone(llm, asks)
        together = replay(llm._engine, asks, [0] * NUM_REQUESTS)
    assert one_by_one != sound, "the mutation did not reach the library"
    assert together != one_by_one, "the replay does not notice an order of sums that depends on M"
