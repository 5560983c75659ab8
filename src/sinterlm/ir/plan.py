"""The nouns a plan adds to a graph: where every packed weight and every buffer lies.

``passes.layout`` and ``passes.memory`` fill them; a backend turns them into code; ``artifact``
writes them down. Packed layouts:

* ``panels``: the GEMM operand W[N, K] as ``[N/64][K/P][64][P]`` (P = 2 for bf16, 1 for fp32): 64
  output columns side by side, pairs of k adjacent. N is padded to 64 and K to 16, with zeros.
* ``panels`` in codes (``format``): per panel of 64 columns, in it per group of k, the codes, then
  64 scales (fp16, or fp32 where a group is all of k), then 64 fp32 offsets where the format has
  them, so that one stream feeds a worker. 8 bits: ``[group/4][64][4]`` bytes. 4 bits:
  ``[group/8][64][4]``, low nibbles one quad of k, high ones the next. The last group may be short.
  N is padded to 64 with scales of zero, K to 64 (or the activations' group) with codes of zero.
* ``tiles``:  a GPU's, bf16 ``[N/64][K/64][64][64]``; codes as ``backends/gpu/kernels`` has them.
* ``pitched``: bf16 ``[N][pitch_of(K)]``, for a GPU vendor's GEMM library, which knows rows alone.
* ``rows``:   ``[V, K]`` row-major, K padded to 16 with zeros (an untied embedding table).
* ``vector``: fp32 ``[N]``, padded like the columns it belongs to, with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sinterlm.ir.graph import Graph
from sinterlm.ir.quant import GemmFormat

#: How a target wants its GEMM operands; "pitched" = layers' matrices in bf16 so, others in tiles.
MatrixOrder = Literal["panels", "tiles", "pitched"]
Kind = Literal["panels", "tiles", "pitched", "rows", "vector"]

#: Elements of bf16 between rows that begin at one memory channel, 512 bytes; and zeros behind each
#: row that keep them apart.
_CHANNEL, _PITCH_PADDING = 256, 64


def pitch_of(k: int) -> int:
    """Elements from one row of a ``pitched`` matrix to the next: ``k``, a multiple of 64, and 64
    zeros where rows, as nearly all models have them, would else lie a multiple of 512 bytes apart
    and begin at one memory channel (ROCm's workload guide)."""
    return k if k % _CHANNEL else k + _PITCH_PADDING


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of a checkpoint tensor [out, in] become packed columns [at, at + n)."""

    weight: str
    start: int
    stop: int
    at: int


@dataclass(frozen=True)
class PackedTensor:
    """One tensor of the weights file. ``offset`` is a multiple of 64 bytes."""

    name: str  #: "embed", "lm_head", "final_norm", "layers.3.qkv", "layers.3.qkv_bias", …
    kind: Kind
    #: The last three: in codes, see ``format``.
    dtype: Literal["bf16", "fp32", "int8", "int4", "fp8"]
    n: int  #: columns (rows of an embedding table), padded
    k: int  #: padded depth; 1 for a vector
    k_real: int  #: depth in the checkpoint
    segments: tuple[Segment, ...]
    offset: int  #: bytes
    nbytes: int
    format: GemmFormat | None = None  #: of panels or tiles in codes


@dataclass(frozen=True)
class WeightLayout:
    """The weights file: every tensor, its size, and a 64-bit hash of all of this."""

    tensors: tuple[PackedTensor, ...]
    nbytes: int
    layout_hash: int

    def find(self, name: str) -> PackedTensor | None:
        """The tensor called ``name``, or None."""
        return next((t for t in self.tensors if t.name == name), None)


@dataclass(frozen=True)
class Buffer:
    """One activation: ``nbytes`` per token (unit "T") or per sampled row (unit "R"), at ``offset``
    bytes per unit in that unit's arena; offsets and sizes are multiples of 64."""

    name: str
    unit: Literal["T", "R"]
    nbytes: int
    offset: int


@dataclass(frozen=True)
class MemoryPlan:
    """Activation arenas: bytes per token and per sampled row, and the buffers inside."""

    buffers: tuple[Buffer, ...]
    bytes_per_token: int
    bytes_per_row: int


@dataclass(frozen=True)
class Plan:
    """All a backend needs: the fused graph, the packed weights, the buffers."""

    graph: Graph
    layout: WeightLayout
    memory: MemoryPlan
