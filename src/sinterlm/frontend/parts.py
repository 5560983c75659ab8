"""A checkpoint's part for one of several ranks (tensor parallelism): Megatron-LM's split.

Rank r has the r-th block of heads, of KV heads with them, and of intermediate columns: rows of q,
k, v, gate and up, columns of o and down (Shoeybi et al. 2019, arXiv:1909.08053). Norms, biases of o
and down, the embedding and lm_head are whole on every rank. Refuses sizes that do not divide, and
checkpoints whose floats no longer exist.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from sinterlm.artifact.progress import Progress
from sinterlm.artifact.text import TextAssets
from sinterlm.errors import UnsupportedModelError, UsageError
from sinterlm.frontend.checkpoint import Checkpoint
from sinterlm.frontend.numeric import Array, ReadDType
from sinterlm.ir.graph import DecoderConfig

_ROWS = re.compile(r"\.(self_attn\.[qkv]_proj|mlp\.(gate|up)_proj)\.(weight|bias)$")
_COLUMNS = re.compile(r"\.(self_attn\.o_proj|mlp\.down_proj)\.weight$")


@dataclass(frozen=True)
class Part:
    """Rank ``rank`` of ``size``."""

    rank: int
    size: int

    def __post_init__(self) -> None:
        """Raises UsageError for a rank that there is not."""
        if self.size < 1 or not 0 <= self.rank < self.size:
            raise UsageError(
                f"tensor_parallel_rank={self.rank} of tensor_parallel_size={self.size}: a rank is "
                "at least 0 and less than the size"
            )

    def config(self, config: DecoderConfig) -> DecoderConfig:
        """The decoder that one rank computes. Raises UnsupportedModelError."""
        for name in ("num_kv_heads", "num_heads", "intermediate_size"):
            value = getattr(config, name)
            if value % self.size:
                raise UnsupportedModelError(
                    f"tensor_parallel_size={self.size} does not divide {name}={value} of this "
                    f"{config.architecture}; give a size that divides it"
                )
        return replace(
            config,
            num_heads=config.num_heads // self.size,
            num_kv_heads=config.num_kv_heads // self.size,
            intermediate_size=config.intermediate_size // self.size,
        )

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What is left of a tensor's shape, [out, in] or [out]. One that does not divide stays as
        it is: it is not what the config asks for, and ``check_tensors`` says so."""
        axis = _split_axis(name)
        return tuple(
            n // self.size if i == axis and n % self.size == 0 else n for i, n in enumerate(shape)
        )

    def slice(self, name: str, tensor: Array) -> Array:
        """The rank's block of a whole tensor, C-contiguous."""
        axis = _split_axis(name)
        if axis is None:
            return tensor
        length = tensor.shape[axis] // self.size
        block = slice(self.rank * length, (self.rank + 1) * length)
        return np.ascontiguousarray(tensor[block] if axis == 0 else tensor[:, block])


def _split_axis(name: str) -> int | None:
    """The axis along which ranks share a tensor out; None: each has all of it."""
    return 0 if _ROWS.search(name) else 1 if _COLUMNS.search(name) else None


class PartCheckpoint(Checkpoint):
    """One rank's part of ``whole``, which it owns; every tensor under its own name."""

    def __init__(self, whole: Checkpoint, part: Part) -> None:
        """Raises UnsupportedModelError where the model cannot be shared out."""
        if whole.is_quantised:
            raise UnsupportedModelError(
                f"{whole.name} is stored in codes, which tensor_parallel_size={part.size} cannot "
                "share out; give the checkpoint that it was quantised from"
            )
        self._whole, self.part = whole, part
        self.name = f"{whole.name} (rank {part.rank} of {part.size})"
        self.path, self.files = whole.path, whole.files
        self.config = part.config(whole.config)
        self.tensors = {
            name: replace(
                info, shape=part.shape(name, info.shape),
                nbytes=info.nbytes if _split_axis(name) is None else info.nbytes // part.size,
            )
            for name, info in whole.tensors.items()
        }  # fmt: skip

    @property
    def whole(self) -> Checkpoint:
        """The checkpoint that this is a part of."""
        return self._whole

    @property
    def text(self) -> TextAssets:
        """The whole checkpoint's."""
        return self.whole.text

    def read(self, name: str, dtype: ReadDType) -> Array:
        """The rank's block of the tensor; codes of a GGUF file become the floats they stand for."""
        return self.part.slice(name, self.whole.read(name, dtype))

    def kv_scales(self) -> tuple[tuple[float, float], ...]:
        """The whole checkpoint's."""
        return self.whole.kv_scales()

    def digest(self, progress: Progress | None = None) -> str:
        """Of the whole checkpoint and this part of it."""
        return self.digest_from(self.whole.digest(progress))

    def digest_from(self, whole_digest: str) -> str:
        """``digest``, where the whole checkpoint's is known."""
        text = f"{whole_digest} rank {self.part.rank} of {self.part.size}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _stored_bytes(self, name: str) -> Iterator[memoryview]:
        yield memoryview(self.part.slice(name, self.whole.read_exact(name)).tobytes())

    def close(self) -> None:
        """Release the whole checkpoint's files."""
        self.whole.close()


def part_of(whole: Checkpoint, part: Part) -> Checkpoint:
    """``whole`` where there is one rank, else its part. Raises UnsupportedModelError, ``whole``
    being closed then."""
    if part.size == 1:
        return whole
    try:
        return PartCheckpoint(whole, part)
    except UnsupportedModelError:
        whole.close()
        raise
