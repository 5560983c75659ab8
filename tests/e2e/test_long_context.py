"""Contexts of 32,768 tokens: attention against float64, and models however a prompt is cut."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sinterlm import LLM, SamplingParams
from sinterlm.artifact.isa import available_isas
from tests.e2e.replay import fingerprint
from tests.kernels import oplib
from tests.kernels.oplib import OpLib, PagedStep, rounded
from tests.kernels.test_attention import attend, fill
from tests.libraries import BuildLibrary

pytestmark = pytest.mark.slow
LENGTH = 32768
WINDOW = 4096

#: One layer with a window and one without, 2 heads on one KV head of 16.
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": LENGTH,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": True,
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "max_window_layers": 1,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}


@pytest.mark.parametrize("codes", [False, True], ids=["kv-wide", "kv-codes"])
@pytest.mark.parametrize("isa", available_isas())
def test_attention(isa: str, codes: bool, build_library: BuildLibrary) -> None:
    """A decode step whose chunks are shared out, and a prefill over a chunk's end, beside a short
    sequence; with a window and without; sharing changes no bit."""
    flags = oplib.KV_CODES if codes else ()
    ops = OpLib(isa, build_library(oplib.SOURCE.read_text(), isa, flags), codes)
    heads, dim, rng = 2, 16, np.random.default_rng(0)
    step = PagedStep([1, 1], [LENGTH, 40], 1, dim, 64, True, codes=codes)
    kv = fill(step, rng)
    for queries in ([1, 1], [30, 3]):
        step.ask(queries)
        q = rng.normal(size=(sum(queries), heads * dim)).astype("f4") * 4
        rq = rounded(q, True).reshape(len(q), heads, dim).astype("f8")
        for window in (0, WINDOW):
            want = attend(step, kv, rq, heads, dim**-0.5, window)
            alone, *shared = (
                ops.attention(step, q, heads, dim**-0.5, window, threads=threads)
                for threads in (1, 2, 7)
            )
            assert np.max(np.abs(alone - want)) <= 2.0**-7
            for other in shared:
                assert other.tobytes() == alone.tobytes(), (queries, window)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_prompts_however_cut(kv_cache_dtype: str, tmp_path: Path, cache_dir: Path) -> None:
    """The last positions that the model has, from prefills of other lengths on other threads."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    rng = np.random.default_rng(1)
    prompts = [{"prompt_token_ids": rng.integers(0, 131, n).tolist()} for n in (LENGTH - 8, 300)]
    params = SamplingParams(
        temperature=0.9, seed=3, max_tokens=8, ignore_eos=True, detokenize=False, logprobs=4
    )
    found = []
    for chunk, mixed, threads, page in ((2048, 2048, 2, 64), (509, 77, 3, 128)):
        with LLM(
            tmp_path, load_format="dummy", kv_cache_dtype=kv_cache_dtype, cache_dir=cache_dir,
            max_num_seqs=2, max_num_batched_tokens=chunk, max_mixed_prefill_tokens=mixed,
            num_threads=threads, block_size=page, kv_cache_memory_bytes=64 << 20,
        ) as llm:  # fmt: skip
            assert llm.max_model_len == LENGTH
            found.append([fingerprint(out) for out in llm.generate(prompts, params)])
    assert found[0] == found[1]
