"""A checkpoint compiled for two ranks, as vLLM asks for it: transformers' logits and tokens."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from sinterlm.artifact.bundle import Bundle
from sinterlm.compile import compile_model
from sinterlm.errors import UnsupportedModelError, UsageError
from sinterlm.options import CompileOptions
from sinterlm.runtime.model import Model
from tests.e2e.support import MODELS, load_golden
from tests.e2e.test_quantised_checkpoints import write_checkpoint
from tests.native.tiny import prefill
from tests.ranks import Meeting, side_by_side

#: Two KV heads of four query heads each, 26 intermediate columns on each rank.
GOLDEN = load_golden("llama-llama3-gqa4")


def part(rank: int, size: int = 2, **changes: object) -> CompileOptions:
    options = {"model": str(GOLDEN.folder), "dtype": "fp32", **changes}
    return CompileOptions(**options, tensor_parallel_size=size, tensor_parallel_rank=rank)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bundles(cache_dir: Path) -> list[Bundle]:
    return [compile_model(part(rank)) for rank in range(2)]


def test_logits_are_those_of_transformers(bundles: list[Bundle]) -> None:
    """From files alone, through every pass."""
    meeting = Meeting(2)
    with ExitStack() as opened:
        models = []
        for rank, bundle in enumerate(bundles):
            model = Model(
                bundle, num_threads=1, max_tokens=64, max_seqs=1, max_sample_rows=64,
                max_model_len=512, link=meeting.link(rank),
            )  # fmt: skip
            model.alloc_kv(32, 16)
            models.append(opened.enter_context(model))
        for prompt, want in zip(GOLDEN.prompts, GOLDEN.logits, strict=True):
            feed = partial(prefill, ids=prompt.tolist(), pages=list(range(32)), chunk=64)
            one, two = side_by_side([partial(feed, model) for model in models])
            assert np.array_equal(one, two)
            assert np.abs(one - want).max() < 2e-5 * np.abs(want).max()


def test_ranks_share_code_and_not_weights(bundles: list[Bundle]) -> None:
    one, two = (bundle.manifest for bundle in bundles)
    assert one.code_key == two.code_key and one.weights_key != two.weights_key
    assert (one.shape.num_heads, one.shape.num_kv_heads, one.shape.intermediate_size) == (4, 1, 26)
    assert one.model == f"{GOLDEN.folder.name} (rank 0 of 2)"
    again = compile_model(part(1))
    assert again.manifest_sha256 == bundles[1].manifest_sha256
    assert compile_model(part(0, 1)).manifest.code_key != one.code_key


def test_what_cannot_be_shared_out(bundles: list[Bundle], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="does not divide num_kv_heads=2"):
        compile_model(part(0, 4))
    with pytest.raises(UnsupportedModelError, match="num_kv_heads=1"):
        compile_model(part(0, model=str(MODELS / "qwen2-yarn-gqa7")))
    codes = write_checkpoint(tmp_path / "gptq", "gptq")
    with pytest.raises(UnsupportedModelError, match="quantised from"):
        compile_model(part(0, model=str(codes)))
    with pytest.raises(UsageError, match="tensor_parallel_rank=2"):
        compile_model(part(2))
    with pytest.raises(UsageError, match="tensor_parallel_size has a meaning for checkpoints"):
        compile_model(part(0, model=str(bundles[0].root)))
    with pytest.raises(UsageError, match="--target gfx942"):
        compile_model(part(0, dtype="bf16", target="gfx942"))
