"""Prompts for a load: random, shared prefix, ShareGPT, plain text, conversations, a frozen trace.

``random``, ``prefix_repetition`` and ``sharegpt`` draw exactly what vLLM 0.32 draws with the same
seed and tokenizer (``vllm/benchmarks/datasets``); tests hold samples made by vLLM itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sinterlm.bench.workload import Request
from sinterlm.engine.tokenizer import Tokenizer
from sinterlm.errors import UsageError

_ROUNDS = 10  #: of decoding and encoding again until a prompt has its length

#: The trace that ships with the package: 256 requests of mixed lengths.
FROZEN_TRACE = Path(__file__).parent / "data" / "mixed.jsonl"


@dataclass(frozen=True)
class Sampling:
    """What every dataset is asked for."""

    num_prompts: int
    seed: int = 0
    id_prefix: str = ""
    output_len: int | None = None  #: tokens; None = what the dataset says
    shuffle: bool = True


@dataclass(frozen=True)
class RandomShape:
    """Lengths of random prompts, in tokens; drawn evenly within ``range_ratio`` of the mean."""

    input_len: int = 1024
    output_len: int = 128
    prefix_len: int = 0  #: shared by all prompts, before input_len tokens of their own
    input_range_ratio: float = 0.0
    output_range_ratio: float = 0.0

    def __post_init__(self) -> None:
        for ratio in (self.input_range_ratio, self.output_range_ratio):
            if not 0 <= ratio < 1:
                raise UsageError(f"--random-range-ratio {ratio:g} must be from 0 up to below 1")
        if min(self.input_len, self.prefix_len) < 0 or self.output_len < 1:
            raise UsageError("lengths of random prompts must not be negative, outputs at least 1")


def random_requests(tokenizer: Tokenizer, shape: RandomShape, how: Sampling) -> list[Request]:
    """Runs of consecutive token ids from random starts, as text that encodes to them again.

    Drawn in this order from one generator: input lengths, output lengths, starts, the prefix, and
    then what repairs prompts whose text encodes to another length.
    """
    generator = np.random.default_rng(how.seed)
    real = max(0, shape.input_len - tokenizer.num_special_tokens)
    low = math.floor(real * (1 - shape.input_range_ratio))
    if shape.prefix_len + low < 1:
        raise UsageError(
            f"--random-input-len {shape.input_len} leaves prompts without a token; raise it, or "
            "--random-prefix-len"
        )
    high = math.ceil(real * (1 + shape.input_range_ratio))
    out_low = max(math.floor(shape.output_len * (1 - shape.output_range_ratio)), 1)
    out_high = max(math.ceil(shape.output_len * (1 + shape.output_range_ratio)), 1)
    vocab_size = tokenizer.base_vocab_size
    input_lens = generator.integers(low, high + 1, size=how.num_prompts)
    output_lens = generator.integers(out_low, out_high + 1, size=how.num_prompts)
    starts = generator.integers(0, vocab_size, size=how.num_prompts)
    allowed = np.setdiff1d(np.arange(vocab_size), tokenizer.special_token_ids)

    def fill(count: int) -> list[int]:
        return [int(i) for i in generator.integers(0, vocab_size, size=count)]

    prefix: list[int] = []
    if shape.prefix_len > 0:
        drawn = allowed[generator.integers(0, len(allowed), size=shape.prefix_len)].tolist()
        _, prefix = settle(tokenizer, drawn, shape.prefix_len, fill)
    requests = []
    for i in range(how.num_prompts):
        length = int(input_lens[i])
        at = (int(starts[i]) + i + np.arange(length)) % len(allowed)
        ids = prefix + allowed[at].tolist()
        text, ids = settle(tokenizer, ids, shape.prefix_len + length, fill)
        requests.append(
            Request(f"{how.id_prefix}{i}", text, len(ids), int(output_lens[i]), tuple(ids))
        )
    return requests


def settle(
    tokenizer: Tokenizer, ids: list[int], length: int, fill: Callable[[int], list[int]]
) -> tuple[str, list[int]]:
    """A text and the ids it encodes to, mostly ``length`` of them: decode, encode, cut or fill."""
    for attempt in range(_ROUNDS + 1):
        text = tokenizer.decode(ids, skip_special_tokens=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
        if attempt == _ROUNDS or len(ids) == length:
            break
        ids = ids + fill(length - len(ids)) if len(ids) < length else ids[:length]
    return text, ids


@dataclass(frozen=True)
class PrefixShape:
    """Prompts that share one of several prefixes; lengths in tokens."""

    prefix_len: int = 256
    suffix_len: int = 256
    num_prefixes: int = 10
    output_len: int = 128


def prefix_requests(tokenizer: Tokenizer, shape: PrefixShape, how: Sampling) -> list[Request]:
    """``num_prompts // num_prefixes`` prompts for each prefix, shuffled."""
    each = how.num_prompts // shape.num_prefixes
    if each == 0:
        raise UsageError(
            f"--num-prompts {how.num_prompts} is less than the {shape.num_prefixes} of "
            "--prefix-repetition-num-prefixes"
        )
    # The legacy generators, because vLLM seeds and uses the global ones.
    generator = np.random.RandomState(how.seed)

    def draw(count: int) -> list[int]:
        return [int(i) for i in generator.randint(0, tokenizer.base_vocab_size, size=count)]

    requests = []
    for _ in range(shape.num_prefixes):
        _, prefix = settle(tokenizer, draw(shape.prefix_len), shape.prefix_len, draw)
        for _ in range(each):
            _, suffix = settle(tokenizer, draw(shape.suffix_len), shape.suffix_len, draw)
            ids = prefix + suffix
            text = tokenizer.decode(ids, skip_special_tokens=False)
            requests.append(Request("", text, len(ids), how.output_len or shape.output_len))
    if how.shuffle:
        random.Random(how.seed).shuffle(requests)
    return [replace(one, request_id=f"{how.id_prefix}{i}") for i, one in enumerate(requests)]


def sharegpt_requests(tokenizer: Tokenizer, path: Path, how: Sampling) -> list[Request]:
    """First question of each conversation, and as many tokens as its answer has.

    Left out, as in vLLM: prompts or answers under 4 tokens, prompts over 1024, both over 2048.
    """
    entries = _conversations(path)
    if how.shuffle:
        random.Random(how.seed).shuffle(entries)
    requests: list[Request] = []
    for turns in entries:
        if len(requests) == how.num_prompts:
            break
        prompt_len = len(tokenizer.encode(turns[0]))
        output_len = how.output_len or len(tokenizer.encode(turns[1]))
        too_short = prompt_len < 4 or (how.output_len is None and output_len < 4)
        if too_short or prompt_len > 1024 or prompt_len + output_len > 2048:
            continue
        name = f"{how.id_prefix}{len(requests)}"
        requests.append(Request(name, turns[0], prompt_len, output_len))
    return _oversampled(requests, how, path)


def text_requests(tokenizer: Tokenizer, path: Path, input_len: int, how: Sampling) -> list[Request]:
    """Successive slices of ``input_len`` tokens of a plain text, from its beginning again when it
    ends."""
    ids = tokenizer.encode(_read(path), add_special_tokens=False)
    if len(ids) < input_len:
        raise UsageError(f"{path} has {len(ids)} tokens, fewer than the --input-len {input_len}")
    slices = [ids[at : at + input_len] for at in range(0, len(ids) - input_len + 1, input_len)]
    requests = []
    for i in range(how.num_prompts):
        chosen = slices[i % len(slices)]
        text = tokenizer.decode(chosen, skip_special_tokens=False)
        name = f"{how.id_prefix}{i}"
        requests.append(Request(name, text, input_len, how.output_len or 128, tuple(chosen)))
    return requests


def multi_turn_requests(
    tokenizer: Tokenizer, path: Path | None, num_turns: int, shape: RandomShape, how: Sampling
) -> list[Request]:
    """Conversations of ``num_turns`` questions: of a ShareGPT file, else random ones.

    ``num_prompts`` counts questions. What was said before is added when each is sent.
    """
    if path is None:
        drawn = random_requests(tokenizer, shape, how)
        return [replace(r, conversation=i // num_turns) for i, r in enumerate(drawn)]
    requests: list[Request] = []
    entries = _conversations(path)
    if how.shuffle:
        random.Random(how.seed).shuffle(entries)
    for number, turns in enumerate(entries):
        for question, answer in list(zip(turns[::2], turns[1::2], strict=False))[:num_turns]:
            output_len = how.output_len or max(1, len(tokenizer.encode(answer)))
            name, length = f"{how.id_prefix}{len(requests)}", len(tokenizer.encode(question))
            requests.append(Request(name, question, length, output_len, conversation=number))
            if len(requests) == how.num_prompts:
                return requests
    raise UsageError(f"{path} holds {len(requests)} questions, fewer than --num-prompts")


def trace_requests(tokenizer: Tokenizer, path: Path, how: Sampling) -> list[Request]:
    """A trace: one JSON object a line with ``timestamp`` (s), ``input_length``, ``output_length``.

    Token ids depend on seed and line alone, so the trace asks the same of every engine. With
    ``hash_ids`` (blocks of 16 tokens), equal ids are equal tokens, as in Mooncake's traces.
    """
    allowed = np.setdiff1d(np.arange(tokenizer.base_vocab_size), tokenizer.special_token_ids)
    requests = []
    for number, line in enumerate(_read(path).splitlines()[: how.num_prompts]):
        try:
            entry = json.loads(line)
            length, wanted = int(entry["input_length"]), int(entry["output_length"])
            at_s = float(entry["timestamp"])
            blocks = entry.get("hash_ids") or [f"line {number}"]
        except (ValueError, KeyError, TypeError) as exc:
            raise UsageError(f"{path}, line {number + 1}: {exc!r}; expected timestamp, "
                             "input_length and output_length") from exc  # fmt: skip
        width = 16 if entry.get("hash_ids") else length
        ids = [i for block in blocks for i in _block(allowed, f"{how.seed}:{block}", width)][
            :length
        ]
        if len(ids) < length or length < 1 or wanted < 1:
            raise UsageError(f"{path}, line {number + 1}: lengths do not fit its hash_ids")
        text = tokenizer.decode(ids, skip_special_tokens=False)
        name = f"{how.id_prefix}{number}"
        requests.append(
            Request(name, text, length, how.output_len or wanted, tuple(ids), at_s=at_s)
        )
    if len(requests) < how.num_prompts:
        raise UsageError(f"{path} has {len(requests)} lines, fewer than --num-prompts")
    return requests


def _block(allowed: np.ndarray[Any, Any], key: str, count: int) -> list[int]:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    drawn = np.random.default_rng(seed).integers(0, len(allowed), size=count)
    return [int(i) for i in allowed[drawn]]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise UsageError(f"{path} is not UTF-8 text ({exc.reason})") from exc


def _conversations(path: Path) -> list[list[str]]:
    """What was said in each conversation of a ShareGPT file that has two turns or more."""
    try:
        data = json.loads(_read(path))
        found = [
            [str(turn["value"]) for turn in entry["conversations"]]
            for entry in data
            if len(entry.get("conversations", [])) >= 2
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise UsageError(
            f"{path} is no ShareGPT file ({exc!r}); expected a list of objects with "
            "conversations: [{from, value}, ...]"
        ) from exc
    return found


def _oversampled(requests: Sequence[Request], how: Sampling, path: Path) -> list[Request]:
    """Repeat random ones of ``requests`` until there are enough."""
    if not requests:
        raise UsageError(f"{path} holds no conversation of usable length")
    result = list(requests)
    again = random.Random(how.seed)
    while len(result) < how.num_prompts:
        chosen = again.choice(requests)
        result.append(replace(chosen, request_id=f"{how.id_prefix}{len(result)}"))
    return result
