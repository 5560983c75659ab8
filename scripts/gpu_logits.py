"""A device's logits beside those of the CPU's library, token by token, for verify_gpu.py.

The reference is the CPU's greedy answers behind pieces of text, in bf16, and its logits of all
these tokens in bf16 and in fp32. The device is fed the same tokens: a piece as a prompt of its own,
then all answers together, a token of each a step. So steps of few rows, of more and of many count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinterlm import LLM, SamplingParams
from sinterlm.bench.eval_metrics import Deltas, compare
from sinterlm.runtime.batch import Float32, Int32, RowSampling, StepBatch
from sinterlm.runtime.model import Model

TEXT = Path(__file__).resolve().parent.parent / "tests/assets/tiny-llama/heldout.txt"
#: Tokens of each piece, and of each answer. Kernels for at most 16 rows, at most 64, and any.
PIECES, ANSWER = (12, 48, 150), 48
#: Positions that a model needs for them, and tokens of a page on the device.
MOST, PAGE = 256, 64
#: Weights in bf16 beyond which there is no reference in fp32: it takes twice their bytes.
MOST_IN_FP32 = 8 << 30

#: Bounds (docs/gpu.md). Nats, mean over the tokens of prompts and over those of answers, from the
#: CPU's bf16.
MAX_KL = 1e-3
#: From fp32, as a multiple of what the CPU's bf16 has.
MAX_KL_SHARE = 4.0
#: Share of all tokens at which the CPU's bf16 prefers the same one.
LEAST_AGREEMENT = 0.97
#: Logits between the best token and the one that a device draws in place of it: the same as may
#: excuse the CPU's bf16 beside fp32 (docs/numerics.md).
EXCUSED_MARGIN = 0.1


@dataclass(frozen=True)
class Reference:
    """What the CPU said. Row i of a sequence's logits is its opinion after token i."""

    pieces: tuple[int, ...]  #: tokens of each before its answer
    sequences: list[Int32]  #: each piece with its answer
    bf16: Float32  #: [rows, V] of all sequences, one behind the other, without their last tokens
    fp32: Float32 | None  #: the same; None where the model is too large

    @property
    def targets(self) -> Int32:
        """[rows] The token that follows each."""
        return np.concatenate([ids[1:] for ids in self.sequences])

    @property
    def is_answer(self) -> NDArray[np.bool_]:
        """[rows] Whether a decode step makes the row; the others are made with their prompts."""
        return np.concatenate([
            np.arange(len(ids) - 1) >= piece
            for ids, piece in zip(self.sequences, self.pieces, strict=True)
        ])  # fmt: skip

    def save(self, path: Path) -> None:
        """Into an ``.npz``."""
        held: dict[str, Any] = {
            "pieces": self.pieces, "lengths": [len(ids) for ids in self.sequences],
            "tokens": np.concatenate(self.sequences), "bf16": self.bf16,
        }  # fmt: skip
        np.savez(path, **held if self.fp32 is None else {**held, "fp32": self.fp32})

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Inverse of ``save``. Raises FileNotFoundError."""
        with np.load(path) as held:
            sequences = np.split(held["tokens"], np.cumsum(held["lengths"])[:-1])
            pieces = tuple(held["pieces"].tolist())
            return cls(pieces, sequences, held["bf16"], held.get("fp32"))


def reference(model: str) -> Reference:
    """Of a checkpoint that a CPU runs. Raises what ``LLM`` raises."""
    given: dict[str, Any] = {"max_model_len": MOST, "max_num_seqs": 4,
                             "kv_cache_memory_bytes": 1 << 28}  # fmt: skip
    greedy = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    with LLM(model, dtype="bf16", **given) as llm:
        text = llm.tokenizer.encode(TEXT.read_text(encoding="utf-8")[: 8 * sum(PIECES)])
        ends = np.cumsum(PIECES)
        pieces = [text[end - n : end] for end, n in zip(ends, PIECES, strict=True)]
        answers = llm.generate([{"prompt_token_ids": list(ids)} for ids in pieces], greedy)
        sequences = [
            np.array([*ids, *answer.outputs[0].token_ids], np.int32)
            for ids, answer in zip(pieces, answers, strict=True)
        ]
        bf16 = np.concatenate([llm.forward_logits(ids[:-1]) for ids in sequences])
        weights = llm.bundle.manifest.weights
    if weights is None or weights.nbytes > MOST_IN_FP32:
        return Reference(PIECES, sequences, bf16, None)
    with LLM(model, dtype="fp32", **given) as llm:
        fp32 = np.concatenate([llm.forward_logits(ids[:-1]) for ids in sequences])
    return Reference(PIECES, sequences, bf16, fp32)


def sizes() -> dict[str, Any]:
    """What a ``Model`` must be opened for."""
    rows = max(*PIECES, len(PIECES))
    return {"max_tokens": rows, "max_seqs": len(PIECES), "max_sample_rows": rows,
            "max_model_len": MOST}  # fmt: skip


def forced_logits(model: Model, wanted: Reference, rounds: int = 1) -> Float32:
    """The model's logits of the reference's tokens, [rows, V], of the last of ``rounds`` rounds.

    Every step draws as well. Raises AssertionError where that is not the best of its logits.
    """
    width = -(-MOST // PAGE)
    model.alloc_kv(width * len(wanted.sequences), PAGE)
    # Pages of a sequence lie apart.
    pages = np.arange(width * len(wanted.sequences), dtype=np.int32).reshape(width, -1).T
    firsts = np.cumsum([0, *(len(ids) - 1 for ids in wanted.sequences)])[:-1]
    out = np.empty_like(wanted.bf16)
    for _ in range(rounds):
        out[:] = np.nan
        for number, (ids, piece) in enumerate(zip(wanted.sequences, wanted.pieces, strict=True)):
            held = _step([ids[:piece]], [0], pages[[number]])
            out[firsts[number] : firsts[number] + piece] = _drawn(model, held)
        for i in range(len(wanted.sequences[0]) - wanted.pieces[0] - 1):
            at = [piece + i for piece in wanted.pieces]
            fed = [ids[p : p + 1] for ids, p in zip(wanted.sequences, at, strict=True)]
            out[firsts + at] = _drawn(model, _step(fed, at, pages))
    return out


def _step(fed: list[Int32], first: list[int], pages: Int32) -> StepBatch:
    """One step that draws after each of its tokens."""
    starts = np.cumsum([0, *map(len, fed)]).astype(np.int32)
    positions = [p + np.arange(len(ids)) for ids, p in zip(fed, first, strict=True)]
    ends = [p + len(ids) for ids, p in zip(fed, first, strict=True)]
    return StepBatch(
        token_ids=np.concatenate(fed).astype(np.int32),
        positions=np.concatenate(positions).astype(np.int32),
        query_start=starts,
        context_lens=np.array(ends, np.int32),
        page_table=np.ascontiguousarray(pages),
        sample_rows=np.arange(starts[-1], dtype=np.int32),
        sampling=tuple(RowSampling(position=int(p) + 1) for p in np.concatenate(positions)),
        want_logits=True,
    )


def _drawn(model: Model, batch: StepBatch) -> Float32:
    found = model.step(batch)
    assert found.logits is not None
    best = found.logits.max(axis=1)
    drawn = np.take_along_axis(found.logits, found.tokens[:, None].astype(np.int64), axis=1)[:, 0]
    assert np.array_equal(drawn, best), "a token was drawn that is not the best of its row's logits"
    return found.logits


def facts_of(wanted: Reference) -> dict[str, Any]:
    """What the reference itself is like."""
    facts: dict[str, Any] = {"tokens": len(wanted.bf16)}
    if wanted.fp32 is not None:
        own = compare(wanted.fp32, wanted.bf16, wanted.targets)
        facts |= {"KL(fp32||CPU bf16)": _nats(own.kl), "same best token": _share(own.agrees)}
    return facts


def verdict(wanted: Reference, found: Float32) -> dict[str, Any]:
    """How far ``found`` lies from the CPU's logits. Raises AssertionError beyond a bound, and
    RuntimeFault for numbers that are none."""
    near = compare(wanted.bf16, found, wanted.targets)
    parts = {"prompts": near.kl[~wanted.is_answer], "answers": near.kl[wanted.is_answer]}
    margins = list(parted(wanted, found))
    facts: dict[str, Any] = {
        "tokens": len(found),
        **{f"KL(CPU bf16||device), {name}": _nats(kl) for name, kl in parts.items()},
        "largest KL of a token": _nats(near.kl.max()),
        "same best token": _share(near.agrees),
        "answers that part, by the margin": [round(m, 4) for m in margins],
    }
    wrong = [name for name, kl in parts.items() if kl.mean() > MAX_KL]
    wrong = [f"KL of {name} is beyond {MAX_KL} nats" for name in wrong]
    if wanted.fp32 is not None:
        far = {name: compare(wanted.fp32, logits, wanted.targets)
               for name, logits in (("CPU bf16", wanted.bf16), ("device", found))}  # fmt: skip
        facts |= {f"KL(fp32||{name})": _nats(deltas.kl) for name, deltas in far.items()}
        if _mean(far["device"]) > MAX_KL_SHARE * _mean(far["CPU bf16"]):
            wrong.append(f"KL from fp32 is more than {MAX_KL_SHARE:g} times that of the CPU's bf16")
    if near.agrees.mean() < LEAST_AGREEMENT:
        wrong.append(f"fewer than {LEAST_AGREEMENT:.0%} of the best tokens agree")
    if margins and max(margins) >= EXCUSED_MARGIN:
        wrong.append(f"an answer parts where the best token leads by {EXCUSED_MARGIN} or more")
    assert not wrong, f"{'; '.join(wrong)}: {facts}"
    return facts


def parted(wanted: Reference, found: Float32) -> Iterator[float]:
    """Of each greedy answer that is not the CPU's, by how much the CPU prefers its own token to the
    device's where they part first."""
    first = 0
    for ids, piece in zip(wanted.sequences, wanted.pieces, strict=True):
        for row in range(first + piece - 1, first + len(ids) - 1):
            ours, theirs = (int(logits[row].argmax()) for logits in (wanted.bf16, found))
            if ours != theirs:
                yield float(wanted.bf16[row, ours] - wanted.bf16[row, theirs])
                break
        first += len(ids) - 1


def _mean(deltas: Deltas) -> float:
    return float(deltas.kl.mean())


def _nats(kl: Any) -> str:
    return f"{np.mean(kl):.2e}"


def _share(agrees: NDArray[np.bool_]) -> str:
    return f"{agrees.mean():.2%}"
