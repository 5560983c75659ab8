"""``quantization_config`` of a ``config.json``, by typed reads: GPTQ, AWQ, compressed-tensors, fp8.

Keys that only tell how the codes were found, or which matrices have none, are not read, and of fp8
neither how activations are to be rounded, which is as wide or as narrow as is asked for. Refuses by
name what would change the meaning of the codes or of the activations beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sinterlm.errors import UnsupportedModelError
from sinterlm.frontend.code_packings import FP8_BLOCK
from sinterlm.frontend.fields import MAX_INT, Fields, show
from sinterlm.ir.quant import ActDType

Packing = Literal[
    "gptq", "awq", "int-quantized", "pack-quantized", "fp8-tensor", "fp8-channel", "fp8-block",
    "fp8-block-inv",
]  # fmt: skip

_SUPPORTED = (
    "gptq (4 or 8 bits), awq (gemm), compressed-tensors (int-quantized, pack-quantized, "
    "float-quantized), fp8 (e4m3), fbgemm_fp8, unquantised bf16, fp16 and fp32 safetensors, or a "
    "GGUF file"
)


@dataclass(frozen=True)
class QuantConfig:
    """How the matrices of a checkpoint are stored in codes."""

    packing: Packing
    bits: Literal[8, 4]
    group: int  #: weights along k that share a scale; 0 = all of k
    symmetric: bool  #: every zero is 2 ** (bits - 1)
    act: ActDType  #: what the checkpoint declares; "graph" = 16-bit activations
    reorders: bool = False  #: groups are given by an index over k (GPTQ's act-order)
    zeros_less_one: bool = False  #: stored zeros are one less, modulo 2 ** bits (GPTQ's format 1)

    @property
    def name(self) -> str:
        """For people and digests: ``gptq-int4``, ``compressed-tensors-int8``, ``fp8``."""
        if self.packing.startswith("fp8"):
            return "fp8"
        method = self.packing if self.packing in ("gptq", "awq") else "compressed-tensors"
        return f"{method}-int{self.bits}"


def read_quantization(fields: Fields) -> QuantConfig | None:
    """The config's ``quantization_config``; None where there is none. Raises CheckpointError,
    UnsupportedModelError."""
    if fields.absent("quantization_config"):
        return None
    found = fields.child("quantization_config")
    if found is None:
        raise UnsupportedModelError(
            f"{fields.what}: quantization_config is empty; supported: none at all, or {_SUPPORTED}"
        )
    method = found.text("quant_method", "unnamed")
    readers = {
        "gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed_tensors, "fp8": _fp8,
        "fbgemm_fp8": _fbgemm,
    }  # fmt: skip
    if method not in readers:
        raise UnsupportedModelError(
            f"{found.what}: quant_method {show(method)} is not supported; supported: {_SUPPORTED}"
        )
    return readers[method](found)


def _gptq(fields: Fields) -> QuantConfig:
    form = fields.text("checkpoint_format", "gptq")
    _only(fields, "checkpoint_format", form, ("gptq", "gptq_v2"))
    _only(fields, "is_marlin_format", fields.boolean("is_marlin_format", False), (False,))
    _only(fields, "pack_dtype", fields.text("pack_dtype", "int32"), ("int32", "torch.int32"))
    _only(fields, "dynamic", fields.data.get("dynamic"), (None, {}))
    return QuantConfig(
        packing="gptq",
        bits=_bits(fields, fields.integer("bits", high=MAX_INT)),
        group=_group(fields, "group_size"),
        symmetric=fields.boolean("sym", True),
        act="graph",
        reorders=fields.boolean("desc_act", False),
        zeros_less_one=form == "gptq",
    )


def _awq(fields: Fields) -> QuantConfig:
    _only(fields, "version", fields.text("version", "gemm").lower(), ("gemm",))
    _only(fields, "zero_point", fields.boolean("zero_point", True), (True,))
    bits = fields.integer("w_bit" if fields.absent("bits") else "bits", high=MAX_INT)
    _only(fields, "bits", bits, (4,))
    key = "q_group_size" if fields.absent("group_size") else "group_size"
    return QuantConfig("awq", 4, _group(fields, key), symmetric=False, act="graph")


def _fp8(fields: Fields) -> QuantConfig:
    """As DeepSeek and Qwen publish it (blocks of weights), or with one scale for a matrix."""
    _only(fields, "fmt", fields.text("fmt", "e4m3"), ("e4m3",))
    if fields.data.get("weight_block_size") is None:
        return _fp8_scaled("fp8-tensor")
    _only_blocks(fields, "weight_block_size")
    return _fp8_scaled("fp8-block-inv")


def _fbgemm(fields: Fields) -> QuantConfig:
    return _fp8_scaled("fp8-channel")


def _fp8_scaled(packing: Packing) -> QuantConfig:
    group = FP8_BLOCK if packing.startswith("fp8-block") else 0
    return QuantConfig(packing, 8, group, symmetric=True, act="graph")


def _only_blocks(fields: Fields, key: str) -> None:
    """Raises UnsupportedModelError unless ``key`` is the size of the blocks that we read."""
    _only(fields, key, fields.data.get(key), ([FP8_BLOCK, FP8_BLOCK],))


def _compressed_tensors(fields: Fields) -> QuantConfig:
    for key in ("sparsity_config", "transform_config"):
        _only(fields, key, fields.data.get(key), (None, {}))
    _kv_cache_scheme(fields)
    _only(fields, "quantization_status",
          fields.text("quantization_status", "compressed"), ("compressed",))  # fmt: skip
    groups = fields.child("config_groups")
    if groups is None or len(groups.data) != 1:
        given = list(groups.data) if groups else []
        raise UnsupportedModelError(
            f"{fields.what}: config_groups are {show(given)}; supported: one group"
        )
    group = groups.child(next(iter(groups.data)))
    weights = group.child("weights") if group else None
    if group is None or weights is None:
        raise groups.error("weights", None, "an object")
    packing = group.text("format", fields.text("format"))
    _only(fields, "format", packing, ("int-quantized", "pack-quantized", "float-quantized"))
    _only(group, "output_activations", group.data.get("output_activations"), (None, {}))
    _only(weights, "dynamic", weights.data.get("dynamic"), (None, False))
    if packing == "float-quantized":
        return _float_quantized(weights)
    _only(weights, "type", weights.text("type", "int"), ("int",))
    strategy = weights.text("strategy", "tensor" if weights.absent("group_size") else "group")
    _only(weights, "strategy", strategy, ("tensor", "channel", "group"))
    bits = _bits(weights, weights.integer("num_bits", 8, high=MAX_INT))
    if packing == "int-quantized":
        _only(weights, "num_bits", bits, (8,))
    return QuantConfig(
        packing="int-quantized" if packing == "int-quantized" else "pack-quantized",
        bits=bits,
        group=_group(weights, "group_size") if strategy == "group" else 0,
        symmetric=weights.boolean("symmetric", True),
        act=_activations(group),
        reorders=weights.data.get("actorder") in ("group", True),
    )


def _kv_cache_scheme(fields: Fields) -> None:
    """Scales of an fp8 KV cache, one of k and one of v in a layer; ``kv_scales`` reads them."""
    if fields.data.get("kv_cache_scheme") in (None, {}):
        return
    scheme = fields.child("kv_cache_scheme")
    assert scheme is not None
    _only(scheme, "type", scheme.text("type", "int"), ("float",))
    _only(scheme, "num_bits", scheme.integer("num_bits", 8, high=MAX_INT), (8,))
    _only(scheme, "strategy", scheme.text("strategy", "tensor"), ("tensor",))
    _only(scheme, "symmetric", scheme.boolean("symmetric", True), (True,))
    _only(scheme, "dynamic", scheme.data.get("dynamic"), (None, False))


def _float_quantized(weights: Fields) -> QuantConfig:
    """fp8 weights of compressed-tensors."""
    _only(weights, "type", weights.text("type"), ("float",))
    _only(weights, "num_bits", weights.integer("num_bits", 8, high=MAX_INT), (8,))
    _only(weights, "symmetric", weights.boolean("symmetric", True), (True,))
    strategy = weights.text("strategy", "tensor")
    _only(weights, "strategy", strategy, ("tensor", "channel", "block"))
    if strategy == "block":
        _only_blocks(weights, "block_structure")
        return _fp8_scaled("fp8-block")
    return _fp8_scaled("fp8-channel" if strategy == "channel" else "fp8-tensor")


def _activations(group: Fields) -> ActDType:
    """int8 for dynamic 8-bit activations, the graph's dtype where none are declared."""
    found = group.child("input_activations")
    if found is None:
        return "graph"
    _only(found, "type", found.text("type", "int"), ("int",))
    _only(found, "num_bits", found.integer("num_bits", 8, high=MAX_INT), (8,))
    _only(found, "symmetric", found.boolean("symmetric", True), (True,))
    _only(found, "dynamic", found.data.get("dynamic"), (True,))
    _only(found, "strategy", found.text("strategy", "token"), ("token", "group"))
    return "int8"


def _bits(fields: Fields, bits: int) -> Literal[8, 4]:
    _only(fields, "bits", bits, (4, 8))
    return 4 if bits == 4 else 8


def _group(fields: Fields, key: str) -> int:
    """Weights that share a scale; −1 stands for all of k."""
    if fields.data.get(key) == -1:
        return 0
    return fields.integer(key, high=MAX_INT)


def _only(fields: Fields, key: str, value: object, supported: tuple[object, ...]) -> None:
    """Raises UnsupportedModelError unless ``value`` is one of ``supported``."""
    if value not in supported:
        raise UnsupportedModelError(
            f"{fields.what}: {key!r} is {show(value)}, which is not supported; supported: "
            f"{', '.join(show(item) for item in supported if item is not None)}"
        )
