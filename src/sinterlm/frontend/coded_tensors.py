"""Matrices that safetensors hold in parts (codes, scales, zeros, an index): found, checked, read.
A scale of activations beside them is checked and left unread: activations have finer ones, or none.

Each becomes one tensor under the name that its floats would have. Refuses parts that are missing
or of another shape or dtype, an index that leaves the groups, and zeros where the config says that
there are none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from sinterlm.errors import CheckpointError
from sinterlm.frontend.checkpoint import TensorInfo
from sinterlm.frontend.code_packings import PACKINGS
from sinterlm.frontend.codes import GroupedCodes
from sinterlm.frontend.fields import show
from sinterlm.frontend.numeric import STORAGE, Array, convert
from sinterlm.frontend.quantization_config import QuantConfig
from sinterlm.frontend.weights import StoredTensor
from sinterlm.ir.quant import GemmFormat

#: Groups that GEMMs read. A multiple of the largest is several groups that share a scale.
KEPT_GROUPS = (32, 64, 128)
#: Activations along k that share a scale where a checkpoint declares 8-bit ones per token: finer
#: than it asks for.
ACT_GROUP = 64

_KINDS = ("codes", "scales", "zeros", "index", "shape", "act_scale")
Raw = Callable[[StoredTensor], Array]  #: a part's elements in its shape, as stored


@dataclass(frozen=True)
class CodedTensor:
    """One matrix in parts."""

    info: TensorInfo  #: shape [N, K]; dtype is the config's name, nbytes those of all parts
    config: QuantConfig
    parts: dict[str, StoredTensor]  #: by kind: codes, scales, zeros, index, shape, act_scale

    @property
    def group(self) -> int:
        """Weights along k that share a scale; 0 = all of k."""
        return self.config.group if self.config.group < self.info.shape[1] else 0

    @property
    def num_groups(self) -> int:
        """Scales of a row."""
        return -(-self.info.shape[1] // self.group) if self.group else 1

    def format(self, raw: Raw) -> GemmFormat | None:
        """The format in which a GEMM reads the codes as they are; None where none can: groups of a
        size that it does not know, or spread over k."""
        config, group = self.config, self.group
        if group and group not in KEPT_GROUPS:
            if group % KEPT_GROUPS[-1]:
                return None
            group = KEPT_GROUPS[-1]
        if self._index(raw) is not None:
            return None
        code = PACKINGS[config.packing].code
        rows = config.group if code != "int" and group else 1
        return GemmFormat(
            config.bits, group, config.symmetric, config.act, ACT_GROUP, code=code, rows=rows
        )

    def read(self, name: str, raw: Raw) -> GroupedCodes:
        """The codes. Raises CheckpointError for damage that only contents show."""
        config, packing = self.config, PACKINGS[self.config.packing]
        if "shape" in self.parts and tuple(raw(self.parts["shape"]).tolist()) != self.info.shape:
            raise CheckpointError(f"{name!r}: {packing.shape} is not {list(self.info.shape)}")
        scales = self.parts["scales"]
        return GroupedCodes(
            codes=packing.read_codes(raw(self.parts["codes"]), config.bits),
            scales=packing.read_scales(
                convert(raw(scales), scales.info.dtype, "fp32"), self.info.shape[0]
            ),
            zeros=self._zeros(name, raw),
            bits=config.bits,
            group=self.group,
            index=self._index(raw),
            code=packing.code,
        )

    def _zeros(self, name: str, raw: Raw) -> Array | None:
        """Zeros [N, G] as int16; None where all are the centre."""
        part, config = self.parts.get("zeros"), self.config
        if part is None:
            return None
        zeros = PACKINGS[config.packing].read_zeros(raw(part), config.bits)[: self.info.shape[0]]
        if config.zeros_less_one:
            zeros = (zeros + np.uint8(1)) & np.uint8((1 << config.bits) - 1)
        if not config.symmetric:
            return zeros.astype(np.int16)
        centre = 1 << (config.bits - 1)
        if (zeros != centre).any():
            raise CheckpointError(
                f"{name!r}: quantization_config says that it is symmetric, and its zeros are not "
                f"all {centre}; the one or the other is wrong, download the checkpoint again"
            )
        return None

    def _index(self, raw: Raw) -> Array | None:
        """The group of each k [K]; None where it is k // group."""
        part = self.parts.get("index")
        if part is None:
            return None
        depth, index = self.info.shape[1], raw(part)
        if index.min() < 0 or index.max() >= self.num_groups:
            raise CheckpointError(
                f"{part.file}: an index of groups names group {int(index.max())}, and there are "
                f"{self.num_groups}; download the checkpoint again"
            )
        if np.array_equal(index, np.arange(depth) // (self.group or depth)):
            return None
        return np.asarray(index, np.int32)


def fold_coded(
    stored: Mapping[str, StoredTensor], config: QuantConfig
) -> tuple[dict[str, StoredTensor], dict[str, CodedTensor]]:
    """Tensors that stand alone, and those made of parts by the name of their floats."""
    packing = PACKINGS[config.packing]
    plain, coded = dict(stored), {}
    for name, tensor in stored.items():
        path, _, last = name.rpartition(".")
        if last == packing.codes and tensor.info.dtype not in STORAGE:
            named = {kind: getattr(packing, kind) for kind in _KINDS}
            names = {kind: f"{path}.{part}" for kind, part in named.items() if part}
            parts = {kind: plain.pop(part) for kind, part in names.items() if part in plain}
            coded[f"{path}.weight"] = _checked(parts, names, config)
    return plain, coded


def _checked(
    parts: dict[str, StoredTensor], names: dict[str, str], config: QuantConfig
) -> CodedTensor:
    """A matrix of ``parts``, whose shapes and dtypes follow from those of its codes."""
    packing, codes = PACKINGS[config.packing], parts["codes"].info
    if len(codes.shape) != 2 or 0 in codes.shape:
        raise CheckpointError(f"tensor {show(names['codes'])} has shape {list(codes.shape)}")
    rows, depth = packing.size((codes.shape[0], codes.shape[1]), config.bits)
    group = config.group if 0 < config.group < depth else depth
    if depth % group and packing.code == "int":
        raise CheckpointError(
            f"tensor {show(names['codes'])}: its {depth} weights per row are no multiple of the "
            f"group size {group} in quantization_config"
        )
    shapes = packing.stored_shapes(rows, depth, -(-depth // group), config.bits)
    wanted = {
        "codes": (shapes["codes"], (packing.code_dtype,)),
        "scales": (shapes["scales"], tuple(STORAGE)),
        "zeros": (shapes.get("zeros", ()), (packing.code_dtype,)),
        "index": ((depth,), ("int32",)),
        "shape": ((2,), ("int64", "int32")),
        "act_scale": ((), tuple(STORAGE)),
    }
    needed = {"scales"} | ({"shape"} if packing.shape else set())
    needed |= set() if config.symmetric else {"zeros"}
    needed |= {"index"} if config.reorders else set()
    for kind, (shape, dtypes) in wanted.items():
        if kind in parts:
            _check_part(names[kind], parts[kind].info, shape, dtypes)
        elif kind in needed:
            raise CheckpointError(
                f"{parts['codes'].file}: tensor {show(names[kind])} is missing beside "
                f"{show(names['codes'])}; download the checkpoint again"
            )
    nbytes = sum(part.info.nbytes for part in parts.values())
    return CodedTensor(TensorInfo((rows, depth), config.name, nbytes), config, parts)


def _check_part(
    name: str, info: TensorInfo, shape: tuple[int, ...], dtypes: tuple[str, ...]
) -> None:
    is_number = not shape and math.prod(info.shape) == 1  # of any number of axes
    if (info.shape != shape and not is_number) or info.dtype not in dtypes:
        raise CheckpointError(
            f"tensor {show(name)} is {info.dtype}{list(info.shape)}, expected "
            f"{' or '.join(dtypes)}{list(shape)} by quantization_config"
        )
