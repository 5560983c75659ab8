"""Tiny checkpoints of every architecture against Hugging Face transformers in float32.

Three comparisons hang on one another: the NumPy twin against transformers (config, graph, passes),
our fp32 library against transformers (kernels, packing, engine), and our bf16 library against the
NumPy bf16 twin, which rounds at the same places.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sinterlm import LLM, SamplingParams
from tests.e2e.conftest import OpenModel
from tests.e2e.damage import NORM, edit_tensors
from tests.e2e.support import QUICK, Golden, all_models, copy_model, load_golden
from tests.e2e.twin import open_twin, twin_logits

#: Of the largest logit. A dot of K terms is off by at most K * 2**-24 of what it adds up, 1.8e-5
#: for K = 300; transformers itself stands at 3e-6 from float64 on these models.
FP32_TOLERANCE = 2e-5
#: Where sums in another order round to the other neighbour, bf16 results part by one unit, which
#: travels on. Kernel and twin differ by less than this share of what bf16 does to the twin.
TWIN_SHARE = 0.3
#: Never excuse a greedy mismatch above this margin, in logits.
MOST_EXCUSED_MARGIN = 0.1

MODELS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in all_models()
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True, detokenize=False)


def greedy_tokens(llm: LLM, golden: Golden) -> list[list[int]]:
    """Greedy continuations of all prompts, run together."""
    prompts = [{"prompt_token_ids": prompt.tolist()} for prompt in golden.prompts]
    return [list(out.outputs[0].token_ids) for out in llm.generate(prompts, GREEDY)]


@cache
def bf16_twin(name: str) -> list[NDArray[np.float64]]:
    """Logits of the NumPy bf16 twin for each prompt of a golden."""
    golden = load_golden(name)
    twin = open_twin(golden.folder, "bf16")
    return [twin_logits(twin, prompt) for prompt in golden.prompts]


def _rms(values: NDArray[np.floating]) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def assert_bf16_close(llm: LLM, golden: Golden) -> None:
    """Logits near the bf16 twin's, and greedy tokens equal wherever bf16 could decide them."""
    twins = bf16_twin(golden.name)
    moved = np.concatenate([(t - g).ravel() for t, g in zip(twins, golden.logits, strict=True)])
    ours = [llm.forward_logits(prompt) for prompt in golden.prompts]
    apart = np.concatenate([(o - t).ravel() for o, t in zip(ours, twins, strict=True)])
    assert np.isfinite(apart).all()
    assert _rms(apart) <= TWIN_SHARE * _rms(moved)
    assert np.abs(apart).max() <= 0.5 * np.abs(moved).max()
    excused = min(MOST_EXCUSED_MARGIN, float(np.quantile(np.abs(moved), 0.999)))
    for i, (got, want) in enumerate(zip(greedy_tokens(llm, golden), golden.greedy, strict=True)):
        parted = np.flatnonzero(np.array(got) != want)
        if len(parted):  # what follows a first difference answers another prompt
            margin = golden.margins[i][parted[0]]
            assert margin < excused, f"prompt {i} parts at {parted[0]} by {margin} logits"


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", all_models())
def test_twin_is_the_reference(name: str, fused: bool) -> None:
    golden = load_golden(name)
    twin = open_twin(golden.folder, "fp64", fused=fused)
    for prompt, logits in zip(golden.prompts, golden.logits, strict=True):
        error = np.abs(twin_logits(twin, prompt) - logits).max()
        assert error <= FP32_TOLERANCE * np.abs(logits).max()


@pytest.mark.parametrize("name", MODELS)
def test_fp32(name: str, open_model: OpenModel) -> None:
    golden = load_golden(name)
    llm = open_model(golden.folder, dtype="fp32")
    for prompt, logits in zip(golden.prompts, golden.logits, strict=True):
        error = np.abs(llm.forward_logits(prompt) - logits).max()
        assert error <= FP32_TOLERANCE * np.abs(logits).max()
    assert greedy_tokens(llm, golden) == [tokens.tolist() for tokens in golden.greedy]


@pytest.mark.parametrize("name", all_models())
def test_bf16(name: str, open_model: OpenModel) -> None:
    golden = load_golden(name)
    assert_bf16_close(open_model(golden.folder, dtype="bf16"), golden)


def test_two_fine_tunes_share_code_and_never_weights(open_model: OpenModel, tmp_path: Path) -> None:
    """A fine-tune with half the final norm has half the logits, by the same library; and when the
    two folders swap their names, each name gives the other's logits."""
    golden = load_golden("llama-llama3-gqa4")
    base = copy_model(golden.name, tmp_path / "base")
    tuned = copy_model(golden.name, tmp_path / "tuned")
    edit_tensors(lambda arrays: arrays.update({NORM: arrays[NORM] / 2}))(tuned)
    prompt, logits = golden.prompts[1], golden.logits[1]
    expected = {base: logits, tuned: logits / 2}
    keys = set()
    for _ in range(2):
        for folder, want in expected.items():
            llm = open_model(folder, dtype="fp32")
            assert np.abs(llm.forward_logits(prompt) - want).max() < 1e-3
            keys.add((llm.bundle.manifest.code_key, llm.bundle.manifest.weights_key))
            llm.close()
        base.rename(tmp_path / "aside")
        tuned.rename(base)
        (tmp_path / "aside").rename(tuned)
        expected = {base: expected[tuned], tuned: expected[base]}
    assert len({code for code, _ in keys}) == 1
    assert len({weights for _, weights in keys}) == 2
