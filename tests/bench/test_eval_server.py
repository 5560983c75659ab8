"""``sinterlm eval --server`` against servers that answer as vLLM and llama.cpp do."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import pytest

from sinterlm.artifact.bundle import Bundle
from sinterlm.artifact.progress import LogProgress
from sinterlm.bench.eval import evaluate
from sinterlm.bench.eval_metrics import compare, log_softmax
from sinterlm.bench.eval_server import TOP, compare_told, find_server
from sinterlm.engine.tokenizer import Tokenizer
from sinterlm.errors import UsageError
from tests.bench.test_eval import TEXT, Fake, opener


@pytest.fixture
def tokenizer(tiny: Bundle) -> Tokenizer:
    return Tokenizer(tiny.text())


def best(logits: Any, also: int | None = None) -> dict[int, float]:
    """The TOP tokens of a row, and one more, as vLLM tells of a prompt's token."""
    log_p = log_softmax(logits[None])[0]
    ids = np.argsort(-log_p, kind="stable")[:TOP].tolist()
    ids += [also] if also is not None and also not in ids else []
    return {i: float(log_p[i]) for i in ids}


@contextmanager
def serving(model: Fake, kind: str, faults: dict[str, Any] | None = None) -> Iterator[str]:
    faults = faults or {}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, body: dict[str, Any], status: int = 200) -> None:
            raw = json.dumps(faults.get(self.path, body)).encode()
            self.send_response(faults.get("status", status))
            self.end_headers()
            self.wfile.write(raw)

        def do_GET(self) -> None:
            owner = "llamacpp" if kind == "llama.cpp" else "vllm"
            self.answer({"data": [{"id": "fake", "owned_by": owner}]})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize":
                text = asked.get("content", asked.get("prompt"))
                self.answer({"tokens": model.tokenizer.encode(text, add_special_tokens=False)})
                return
            ids = asked["prompt"]
            logits = model.forward_logits(ids)
            if self.path == "/completion":
                top = [{"id": i, "token": "", "logprob": p} for i, p in best(logits[-1]).items()]
                self.answer({"completion_probabilities": [{"top_logprobs": top}]})
                return
            rows: list[Any] = [None]
            for row, true in zip(logits[:-1], ids[1:], strict=True):
                rows.append({str(i): {"logprob": p} for i, p in best(row, true).items()})
            self.answer({"choices": [{"prompt_logprobs": rows}]})

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("kind", ["vllm", "llama.cpp"])
def test_a_server_is_scored_as_the_model_behind_it(tokenizer: Tokenizer, kind: str) -> None:
    reference = {"fp32": opener(Fake(tokenizer, 0.0))}
    with serving(Fake(tokenizer, 0.1), kind) as url:
        server = find_server(url, None)
        report = evaluate(reference, ("fp32",), TEXT, LogProgress(), server=server)
    score = report.scores[-1]
    ids = np.array(tokenizer.encode(TEXT, add_special_tokens=False), np.int32)
    p, q = (Fake(tokenizer, n, len(ids)).forward_logits(ids)[:-1] for n in (0.0, 0.1))
    whole = compare(p, q, ids[1:])
    far = score.divergence
    assert far is not None and score.tokens == len(ids) - 1
    assert far.top1_agreement == pytest.approx(whole.agrees.mean())
    assert 0.1 * whole.kl.mean() < far.kl < whole.kl.mean()  # part of it hides in the rest
    if kind == "vllm":
        assert score.nll == pytest.approx(whole.nll.mean())
    else:
        assert score.perplexity is None  # some true token is not among those told


def test_divergence_of_what_is_told_and_the_rest() -> None:
    p = np.log(np.array([[0.5, 0.3, 0.1, 0.1]], np.float32))
    told = [{0: float(np.log(0.4)), 1: float(np.log(0.4))}]
    deltas = compare_told(p, told, np.array([1], np.int32))
    expected = 0.5 * np.log(0.5 / 0.4) + 0.3 * np.log(0.3 / 0.4) + 0.2 * np.log(0.2 / 0.2)
    assert deltas.kl[0] == pytest.approx(expected, rel=1e-6)
    assert deltas.nll[0] == pytest.approx(-np.log(0.4))
    assert deltas.agrees[0]


@pytest.mark.parametrize(
    ("faults", "word"),
    [
        ({"/v1/models": {"data": []}}, "no model"),
        ({"/v1/models": ["?"]}, "not what was asked"),
        ({"/tokenize": {"tokens": [1, 2]}}, "other tokens"),
        ({"/v1/completions": {"choices": [{"prompt_logprobs": None}]}}, "no log prob"),
        ({"status": 404}, "404"),
    ],
)
def test_what_a_server_cannot_be_asked(
    tokenizer: Tokenizer, faults: dict[str, Any], word: str
) -> None:
    reference = {"fp32": opener(Fake(tokenizer, 0.0))}
    with (
        serving(Fake(tokenizer, 0.0), "vllm", faults) as url,
        pytest.raises(UsageError, match=word),
    ):
        evaluate(reference, ("fp32",), TEXT, LogProgress(), server=find_server(url, None))
    Fake.open_now = 0


def test_no_server_there() -> None:
    with pytest.raises(UsageError, match="server up"):
        find_server("http://127.0.0.1:9", None)
    with pytest.raises(UsageError, match="no URL"):
        find_server("127.0.0.1:8000", None)
