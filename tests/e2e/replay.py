"""Twenty requests, replayed under any schedule, reduced to the bytes they produced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sinterlm import LLM, SamplingParams
from sinterlm.engine.engine import Engine
from sinterlm.engine.outputs import RequestOutput

NUM_REQUESTS = 20


@dataclass(frozen=True)
class Ask:
    """One request of the replay."""

    prompt: list[int]
    params: SamplingParams


def make_asks(vocab_size: int, longest: int, seed: int) -> list[Ask]:
    """Twenty requests: greedy and sampled, short and long, with and without penalties and bias.

    ``longest`` bounds prompt and answer together, in tokens. Every other prompt begins as others
    do, for up to half of ``longest``; some tell the logprobs of their prompt.
    """
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, vocab_size, longest // 2).tolist()
    asks = []
    for i in range(NUM_REQUESTS):
        answer = int(rng.integers(1, 25))
        most = longest - answer if i % 3 == 0 else 40
        length = int(rng.integers(most // 2, most)) if i % 3 == 0 else int(rng.integers(1, most))
        shape = i % 4
        params = SamplingParams(
            temperature=0.0 if shape == 0 else 0.9,
            top_k=20 if shape == 2 else 0,
            top_p=0.9 if shape == 3 else 1.0,
            min_p=0.02 if i % 6 == 1 else 0.0,
            repetition_penalty=1.2 if i % 7 == 3 else 1.0,
            frequency_penalty=0.3 if i % 7 == 5 else 0.0,
            presence_penalty=0.2 if i % 7 == 5 else 0.0,
            logit_bias={3: -5.0, 5: 1.5} if i % 9 == 4 else None,
            allowed_token_ids=range(i, vocab_size, 3) if i % 6 == 4 else None,
            seed=1000 + i,
            max_tokens=answer,
            ignore_eos=True,
            logprobs=4,
            prompt_logprobs=2 if i % 5 == 2 else None,
        )
        prompt = rng.integers(0, vocab_size, length).tolist()
        if i % 2:
            common = min(length - 1, len(shared))
            prompt[:common] = shared[:common]
        asks.append(Ask(prompt, params))
    return asks


def make_repetitive_asks() -> list[Ask]:
    """Six requests that draw from three tokens, so that what was drawn before is drawn again."""
    return [
        Ask(
            [7, 8, 9, 7, 8, 9, 7, 8, 9],
            SamplingParams(
                temperature=temperature,
                top_k=top_k,
                frequency_penalty=penalty,
                logit_bias=dict.fromkeys((7, 8, 9), 50.0),
                min_tokens=5,
                stop_token_ids=[11],
                seed=i,
                max_tokens=60,
                logprobs=3,
            ),
        )
        for i, (temperature, top_k, penalty) in enumerate(
            [
                (0.0, 0, 0.0),
                (1.0, 0, 0.0),
                (0.7, 3, 0.0),
                (0.0, 0, 0.4),
                (1.0, 0, 0.2),
                (0.3, 2, 0.0),
            ]
        )
    ]


def fingerprint(output: RequestOutput) -> bytes:
    """Token ids and every logprob of a finished request, as bytes: float32 bits, not text."""
    completion = output.outputs[0]
    assert completion.logprobs is not None
    parts = [np.array(completion.token_ids, np.int32).tobytes()]
    prompt = [entry for entry in output.prompt_logprobs or [] if entry is not None]
    for step in prompt + completion.logprobs:
        ids = sorted(step)
        parts.append(np.array(ids, np.int32).tobytes())
        parts.append(np.array([step[i].logprob for i in ids], np.float32).tobytes())
        parts.append(np.array([step[i].rank for i in ids], np.int32).tobytes())
    return b"".join(parts)


def alone(llm: LLM, asks: Sequence[Ask]) -> list[bytes]:
    """Each request with nothing beside it."""
    return [
        fingerprint(llm.generate({"prompt_token_ids": ask.prompt}, ask.params)[0]) for ask in asks
    ]


def replay(engine: Engine, asks: Sequence[Ask], arrivals: Sequence[int]) -> list[bytes]:
    """All requests in one engine, request i submitted before step ``arrivals[i]``."""
    prints: dict[str, bytes] = {}
    waiting = sorted(range(len(asks)), key=lambda i: (arrivals[i], i))
    step = 0
    while waiting or engine.has_unfinished:
        while waiting and (arrivals[waiting[0]] <= step or not engine.has_unfinished):
            i = waiting.pop(0)
            engine.add_request(str(i), asks[i].prompt, asks[i].params)
        most = 1 if waiting else engine.step_limits.num_scheduler_steps
        for delta in engine.step(max_steps=most):
            if delta.output is not None:
                prints[delta.request_id] = fingerprint(delta.output)
        step += 1
    return [prints[str(i)] for i in range(len(asks))]
