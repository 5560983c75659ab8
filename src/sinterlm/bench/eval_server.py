"""Teacher-forced scores of a running server: vLLM's, llama.cpp's or our own, over HTTP.

A server tells the probabilities of its best tokens alone (TOP of them), so divergence is taken over
these and the rest as one: with S the tokens told, p the reference and q the server,

    KL = Σ_S p log(p / q) + p(rest) log(p(rest) / q(rest)),

which is never above the KL over all tokens. vLLM and we answer a window in one request
(``prompt_logprobs``); llama.cpp has no such thing, so there each token is one request whose prompt
is the text before it, and a true token that is not among those told leaves no perplexity.
"""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sinterlm.bench.eval_metrics import Float64, log_softmax
from sinterlm.errors import UsageError
from sinterlm.runtime.batch import Float32, Int32

TOP = 20  #: vLLM's default limit
TIMEOUT_S = 600.0
_ERROR_CHARS = 300  #: of a server's own words that are kept
_FLOOR = -1e4  #: log probability of what a server calls impossible

#: Token id -> log probability, of the tokens a server tells about one position.
Told = dict[int, float]


@dataclass(frozen=True)
class TopDeltas:
    """Per token [n], as ``Deltas``: what a server says, and how far it is from the reference."""

    nll: Float64  #: −log q(t), nats; NaN where the server does not tell
    kl: Float64  #: over the tokens told and the rest as one, nats
    agrees: Any  #: bool: the server's best token is the reference's


@dataclass(frozen=True)
class Server:
    """A model behind ``url``; ``kind`` decides how it is asked."""

    url: str
    model: str
    kind: Literal["openai", "llama.cpp"]

    @property
    def name(self) -> str:
        """For reports."""
        return f"{self.model} at {self.url}"

    def check_tokens(self, text: str, ids: Int32) -> None:
        """Raises UsageError unless the server cuts ``text`` into ``ids``."""
        if self.kind == "llama.cpp":
            body: dict[str, Any] = {"content": text, "add_special": False}
        else:
            body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        theirs = _post(f"{self.url}/tokenize", body).get("tokens")
        if theirs != ids.tolist():
            raise UsageError(
                f"{self.name} cuts the text into other tokens than the model that is its "
                "reference; serve the same model there, or name another here"
            )

    def told(self, ids: Sequence[int], first: int) -> list[Told]:
        """What the server says of the tokens ``ids[first:]``, each after those before it."""
        if self.kind == "llama.cpp":
            return [self._next(ids[:at]) for at in range(first, len(ids))]
        answer = _post(
            f"{self.url}/v1/completions",
            {"model": self.model, "prompt": list(ids), "max_tokens": 1, "temperature": 0,
             "prompt_logprobs": TOP},
        )  # fmt: skip
        rows = _at(answer, "choices", 0, "prompt_logprobs")
        if not isinstance(rows, list) or len(rows) != len(ids):
            raise _strange(self.url, answer)
        return [
            {int(token): _finite(entry["logprob"]) for token, entry in row.items()}
            for row in rows[first:]
        ]

    def _next(self, before: Sequence[int]) -> Told:
        """llama.cpp's best tokens after ``before``; its cache keeps what two requests share."""
        answer = _post(
            f"{self.url}/completion",
            {"prompt": list(before), "n_predict": 1, "n_probs": TOP, "temperature": 0,
             "cache_prompt": True, "post_sampling_probs": False},
        )  # fmt: skip
        best = _at(answer, "completion_probabilities", 0, "top_logprobs")
        if not isinstance(best, list) or not best:
            raise _strange(self.url, answer)
        return {int(entry["id"]): _finite(entry["logprob"]) for entry in best}


def find_server(url: str, model: str | None) -> Server:
    """The server at ``url`` and its model. Raises UsageError where there is none, or several and
    none was named."""
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"--server {url!r} is no URL; write http://host:port")
    base = url.rstrip("/").removesuffix("/v1")
    found = _request(f"{base}/v1/models", None).get("data")
    models = {entry.get("id"): entry for entry in found} if isinstance(found, list) else {}
    if model is None and len(models) == 1:
        model = next(iter(models))
    if model not in models:
        raise UsageError(
            f"--server-model {model!r} is not served at {base}; it has "
            f"{', '.join(map(str, models)) or 'no model'}"
        )
    is_llama = models[model].get("owned_by") == "llamacpp"
    return Server(base, str(model), "llama.cpp" if is_llama else "openai")


def compare_told(reference: Float32, told: Sequence[Told], targets: Int32) -> TopDeltas:
    """What a server ``told`` against reference logits [n, V], where ``targets`` [n] follow."""
    nll, kl, agrees = np.empty(len(told)), np.empty(len(told)), np.empty(len(told), np.bool_)
    for row, tokens in enumerate(told):
        log_p = log_softmax(reference[row : row + 1])[0]
        ids = np.fromiter(tokens, np.int64)
        if not len(ids) or ids.min() < 0 or ids.max() >= len(log_p):
            raise UsageError("the server tells of tokens that the reference does not have")
        log_q = np.fromiter(tokens.values(), np.float64)
        p = np.exp(log_p[ids])
        rest_p, rest_q = max(1 - p.sum(), 1e-12), max(1 - np.exp(log_q).sum(), 1e-12)
        told_kl = (p * (log_p[ids] - log_q)).sum() + rest_p * math.log(rest_p / rest_q)
        kl[row] = max(told_kl, 0.0)
        nll[row] = -tokens.get(int(targets[row]), math.nan)
        agrees[row] = ids[log_q.argmax()] == log_p.argmax()
    return TopDeltas(nll, kl, agrees)


def _post(url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    return _request(url, json.dumps(body).encode())


def _request(url: str, body: bytes | None) -> dict[str, Any]:
    """One JSON object from ``url``. Raises UsageError for anything else."""
    headers = {"Content-Type": "application/json"}
    try:
        asked = urllib.request.Request(url, body, headers)
        with urllib.request.urlopen(asked, timeout=TIMEOUT_S) as answer:
            found = json.loads(answer.read())
    except urllib.error.HTTPError as exc:
        words = exc.read(_ERROR_CHARS).decode(errors="replace")
        raise UsageError(f"{url} answered {exc.code}: {words}") from exc
    except (OSError, ValueError) as exc:
        raise UsageError(f"{url} cannot be asked ({exc}); is the server up?") from exc
    if not isinstance(found, dict):
        raise UsageError(f"{url} gave {json.dumps(found)[:_ERROR_CHARS]}, not what was asked for")
    return found


def _at(value: Any, *path: str | int) -> Any:
    """The value at ``path`` of nested JSON, or None."""
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _finite(value: Any) -> float:
    return max(float(value), _FLOOR)


def _strange(url: str, answer: dict[str, Any]) -> UsageError:
    shown = json.dumps(answer)[:_ERROR_CHARS]
    return UsageError(f"{url} gave no log probabilities of the prompt: {shown}")
