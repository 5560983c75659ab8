"""Calls samplelib.cpp with NumPy arrays, and the reference with the same parameters."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sinterlm.ir import reference_sampling as reference
from sinterlm.runtime.batch import RowSampling
from sinterlm.runtime.library import Sampling
from sinterlm.runtime.model import fill_row


@dataclass
class Drawn:
    tokens: np.ndarray
    logprobs: np.ndarray
    ranks: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray
    bad: int
    none: int

    def bytes(self) -> bytes:
        arrays = self.tokens, self.logprobs, self.ranks, self.top_ids, self.top_logprobs
        return b"".join(a.tobytes() for a in arrays)


class SampleLib:
    def __init__(self, path: Path) -> None:
        self.dll = ctypes.CDLL(str(path))
        self.dll.st_sum_exp.restype = ctypes.c_double

    def sample(
        self,
        logits: np.ndarray,
        rows: Sequence[RowSampling],
        threads: int = 1,
        max_logprobs: int = 0,
        repeat: int = 1,
        early: bool = False,
    ) -> Drawn:
        """Rows are padded with NaN beyond V, which nobody may read."""
        count, vocab = logits.shape
        padded = np.full((count, -(-vocab // 64) * 64 + 64), np.nan, np.float32)
        padded[:, :vocab] = logits
        structs = (Sampling * count)()
        for struct, row in zip(structs, rows, strict=True):
            struct.size = ctypes.sizeof(Sampling)
            fill_row(struct, row)
        out = Drawn(
            np.full(count, -7, np.int32),
            np.full(count, -7, np.float32),
            np.full(count, -7, np.int32),
            np.full((count, max_logprobs), -7, np.int32),
            np.full((count, max_logprobs), -7, np.float32),
            0,
            0,
        )
        bad, none = ctypes.c_int32(), ctypes.c_int32()
        arrays = [out.tokens, out.logprobs, out.ranks, out.top_ids, out.top_logprobs]
        status = self.dll.st_sample(
            threads,
            address(padded),
            ctypes.c_int64(padded.shape[1]),
            vocab,
            structs,
            count,
            max_logprobs,
            *map(address, arrays),
            ctypes.byref(bad),
            ctypes.byref(none),
            repeat,
            int(early),
        )
        assert status == 0
        out.bad, out.none = bad.value, none.value
        return out

    def map(self, name: str, x: np.ndarray) -> np.ndarray:
        """y[i] = f(x[i]) of one of the math functions."""
        y = np.empty_like(x)
        getattr(self.dll, name)(address(x), address(y), x.size)
        return y


def address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def mask_of(ids: Sequence[int], vocab: int) -> np.ndarray:
    """A bit mask over the vocabulary."""
    mask = np.zeros(-(-vocab // 32), np.uint32)
    for i in ids:
        mask[i // 32] |= np.uint32(1 << (i % 32))
    return mask


def row_of(params: reference.RowSampling, vocab: int) -> RowSampling:
    """The run side's parameters for the reference's."""
    return RowSampling(
        temperature=params.temperature,
        top_p=params.top_p,
        min_p=params.min_p,
        top_k=params.top_k,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=params.seed,
        position=params.position,
        num_logprobs=params.num_logprobs,
        prompt_tokens=np.array(params.prompt_tokens, np.int32),
        output_tokens=np.array(params.output_tokens, np.int32),
        bias_ids=np.array(list(params.bias), np.int32),
        bias=np.array(list(params.bias.values()), np.float32),
        allowed=None if params.allowed is None else mask_of(params.allowed, vocab),
    )
