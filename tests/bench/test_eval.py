"""``sinterlm eval`` on a tiny model: the numbers, both outputs, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sinterlm import LLM, cli
from sinterlm.artifact.bundle import Bundle
from sinterlm.artifact.progress import LogProgress
from sinterlm.bench import eval as evaluation
from sinterlm.bench.eval import Opener, Scorer, evaluate
from sinterlm.bench.eval_metrics import log_softmax
from sinterlm.engine.tokenizer import Tokenizer
from sinterlm.errors import ResourceError, UsageError
from sinterlm.runtime.batch import Float32
from tests.bench.conftest import TINY

TEXT = "Call me Ishmael. Some years ago--never mind how long precisely--I went to sea. " * 3
VOCAB = 300


class Fake:
    """A model whose logits depend on the token and its place; counts what is open."""

    open_now = 0

    def __init__(self, tokenizer: Tokenizer, noise: float, max_model_len: int = 32) -> None:
        self.tokenizer, self.max_model_len, self._noise = tokenizer, max_model_len, noise

    def __enter__(self) -> Fake:
        Fake.open_now += 1
        assert Fake.open_now == 1, "two models are open at once"
        return self

    def __exit__(self, *_: object) -> None:
        Fake.open_now -= 1

    def forward_logits(self, token_ids: Iterable[int]) -> Float32:
        ids = np.fromiter(token_ids, np.int64)
        assert len(ids) <= self.max_model_len
        base = np.cos(np.outer(ids + 1, np.arange(1, VOCAB + 1))).astype(np.float32) * 3
        wave = np.sin(np.outer(ids + 3, np.arange(VOCAB))).astype(np.float32)
        return base + np.float32(self._noise) * wave


@pytest.fixture
def tokenizer(tiny: Bundle) -> Tokenizer:
    return Tokenizer(tiny.text())


def opener(model: AbstractContextManager[Scorer]) -> Opener:
    return lambda: model


def openers(tokenizer: Tokenizer, noise: float) -> dict[str, Opener]:
    return {"fp32": opener(Fake(tokenizer, 0.0)), "bf16": opener(Fake(tokenizer, noise))}


def test_scores_are_those_of_the_whole_text(tokenizer: Tokenizer) -> None:
    """The fake looks at one token alone, so windows must give what one pass gives."""
    report = evaluate(openers(tokenizer, 0.1), ("fp32", "bf16"), TEXT, LogProgress())
    ids = np.array(tokenizer.encode(TEXT, add_special_tokens=False))
    p, q = (
        log_softmax(Fake(tokenizer, noise, len(ids)).forward_logits(ids)[:-1]) for noise in (0, 0.1)
    )
    reference, score = report.scores
    assert report.num_windows > 2
    assert reference.tokens == score.tokens == report.text_tokens - 1 == len(ids) - 1
    rows = np.arange(len(p))
    assert reference.nll == pytest.approx(-p[rows, ids[1:]].mean())
    assert reference.perplexity == pytest.approx(np.exp(reference.nll))
    assert reference.divergence is None
    assert score.nll == pytest.approx(-q[rows, ids[1:]].mean())
    far = score.divergence
    assert far is not None and far.kl_interval is not None
    assert far.kl == pytest.approx((np.exp(p) * (p - q)).sum(axis=1).mean())
    assert far.kl_interval[0] <= far.kl <= far.kl_interval[1]
    assert far.top1_agreement == pytest.approx((p.argmax(axis=1) == q.argmax(axis=1)).mean())
    assert list(far.max_logit_delta) == ["50", "99", "99.9"]
    assert sorted(far.max_logit_delta.values()) == list(far.max_logit_delta.values())
    assert report.text_sha256 == hashlib.sha256(TEXT.encode()).hexdigest()


def test_equal_models_do_not_diverge(tokenizer: Tokenizer) -> None:
    score = evaluate(openers(tokenizer, 0.0), ("bf16",), TEXT, LogProgress()).scores[0]
    assert score.divergence is not None
    assert (score.divergence.kl, score.divergence.kl_interval) == (0.0, (0.0, 0.0))
    assert score.divergence.top1_agreement == 1.0
    assert set(score.divergence.max_logit_delta.values()) == {0.0}


def test_order_of_dtypes_is_the_askers(tokenizer: Tokenizer) -> None:
    report = evaluate(openers(tokenizer, 0.1), ("bf16", "fp32"), TEXT, LogProgress())
    assert [score.dtype for score in report.scores] == ["bf16", "fp32"]


def test_text_that_fits_one_window_has_no_interval(tokenizer: Tokenizer) -> None:
    report = evaluate(openers(tokenizer, 0.1), ("bf16",), "Call me Ishmael.", LogProgress())
    assert report.num_windows == 1
    assert report.scores[0].divergence is not None
    assert report.scores[0].divergence.kl_interval is None


def test_two_tokenizers_are_refused(tokenizer: Tokenizer) -> None:
    class Upper(Tokenizer):
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return super().encode(text.upper(), add_special_tokens=add_special_tokens)

    models = openers(tokenizer, 0.0) | {"bf16": opener(Fake(Upper(tokenizer.assets), 0.0))}
    with pytest.raises(UsageError, match="different tokens"):
        evaluate(models, ("bf16",), TEXT, LogProgress())
    Fake.open_now = 0


def test_no_room_on_disk(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ResourceError, match="TMPDIR"):
        evaluate(openers(tokenizer, 0.0), ("bf16",), TEXT, LogProgress())
    assert evaluate(openers(tokenizer, 0.0), ("fp32",), TEXT, LogProgress()).scores


# -- a real model ----------------------------------------------------------------------------------


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def eval_json(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    assert cli.main(["eval", str(TINY), "--num-threads", "1", "--json", *map(str, words)]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def test_json(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = eval_json(capsys, "--text", text_file, "--max-tokens-per-window", "32")
    assert facts["model"] == str(TINY) and facts["text"] == str(text_file)
    assert (facts["reference"], facts["window_tokens"], facts["stride"]) == ("fp32", 32, 16)
    reference, narrow = facts["scores"]
    assert (reference["dtype"], narrow["dtype"]) == ("fp32", "bf16")
    assert reference["divergence"] is None
    far = narrow["divergence"]
    assert 0 < far["kl_interval"][0] <= far["kl"] <= far["kl_interval"][1] < 1e-2
    assert 0.9 < far["top1_agreement"] <= 1
    assert narrow["perplexity"] == pytest.approx(reference["perplexity"], rel=0.05)


def test_perplexity_is_the_models_own(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One window against ``forward_logits`` of the same model."""
    facts = eval_json(capsys, "--text", text_file, "--dtypes", "fp32")
    assert facts["num_windows"] == 1 and len(facts["scores"]) == 1
    with LLM(str(TINY), dtype="fp32", num_threads=1) as llm:
        ids = llm.tokenizer.encode(TEXT, add_special_tokens=False)
        logprobs = log_softmax(llm.forward_logits(ids))
    nll = -logprobs[np.arange(len(ids) - 1), ids[1:]].mean()
    assert facts["scores"][0]["nll"] == pytest.approx(nll, rel=1e-12)


def test_table(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(TINY), "--num-threads", "1", "--text", str(text_file)]) == 0
    out = capsys.readouterr().out
    for word in ("perplexity", "KL(fp32‖dtype)", "bf16", "reference", "same top-1", "p99.9",
                 "one window", "tokens of text in 1 windows"):  # fmt: skip
        assert word in out, word


def test_a_kv_cache_in_codes(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = eval_json(capsys, "--text", text_file, "--dtypes", "fp32+kv8,bf16")
    coded, narrow = facts["scores"]
    assert (coded["dtype"], narrow["dtype"]) == ("fp32+kv8", "bf16")
    assert 0 < coded["divergence"]["kl"] < 1e-2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--dtypes", "fp32,int9"), "'int9' is none of"),
        (("--dtypes", "auto"), "'auto' is no dtype"),
        (("--dtypes", "bf16,bfloat16"), "twice"),
        (("--dtypes", "bf16+kv4"), "'bf16+kv4' is none of"),
        (("--dtypes", "auto+kv8"), "'auto+kv8' is no dtype"),
        (("--dtypes", ""), "is none of"),
        (("--max-tokens-per-window", "x"), "invalid int"),
        (("--tetx", "f"), "did you mean --text?"),
    ],
)
def test_bad_words(words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["eval", str(TINY), *words])
    assert left.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--dtype", "bf16"), "--dtypes"),
        (("--code-only",), "--code-only"),
        (("--bundle-sha256", "0" * 64), "--bundle-sha256"),
        (("--text", "no-such-file"), "no-such-file"),
        (("--max-tokens-per-window", "100000"), "exceeds the context"),
        (("--max-tokens-per-window", "1"), "at least 2"),
        (("--max-tokens-per-window", "16", "--stride", "16"), "--stride 16"),
        (("--quantization", "int8"), "int8"),
        (("--kv-cache-dtype", "int8"), "bf16+kv8"),
    ],
)
def test_refused(words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(TINY), "--num-threads", "1", *words]) == 2
    shown = capsys.readouterr()
    assert told in shown.err and not shown.out


def test_a_bundle_is_refused(tiny: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(tiny.root)]) == 2
    assert "one dtype" in capsys.readouterr().err


def test_a_model_without_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "mute"
    shutil.copytree(TINY, model, ignore=shutil.ignore_patterns("tokenizer*", "expected.npz"))
    assert cli.main(["eval", str(model), "--num-threads", "1"]) == 2
    assert "no tokenizer.json" in capsys.readouterr().err
