"""manifest.json: the one thing the compile side and the run side both know about a bundle.

Standard library only. Reading is strict: a missing, extra or ill-typed field is a BundleError that
names it.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass

from sinterlm.artifact import strict
from sinterlm.errors import BundleError

FORMAT_VERSION = 3
ABI_VERSION = 2  #: must equal SL_ABI_VERSION of abi.h (a test compares them)


@dataclass(frozen=True)
class FileRef:
    """A file of the bundle: path relative to the manifest's folder, bytes, hex SHA-256. The path
    is a plain name, or leads to the cache's ``code`` or ``weights`` beside ``bundles``."""

    path: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class ModelShape:
    """What the run side must know of the model's shape."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int


@dataclass(frozen=True)
class Constants:
    """Numbers that are data, not code; passed to ``sl_open``."""

    rms_eps: float
    qk_eps: float
    attention_scale: float
    rope_attention_factor: float
    inv_freq: tuple[float, ...]
    windows: tuple[int, ...]  #: per layer, 0 = full attention


@dataclass(frozen=True)
class OpCost:
    """Cost of one fused op, linear in what a step holds: for T tokens of which R rows are sampled
    and P (query, key) pairs attended, reading C cached tokens:
    bytes = weight_bytes + T * bytes_per_token + R * bytes_per_row + C * bytes_per_cached_token
    flops = T * flops_per_token + R * flops_per_row + P * flops_per_pair.
    """

    name: str  #: the fused op's kind
    layer: int  #: -1 outside layers
    weight_bytes: int
    bytes_per_token: int
    bytes_per_row: int
    bytes_per_cached_token: int
    flops_per_token: int
    flops_per_row: int
    flops_per_pair: int


@dataclass(frozen=True)
class Manifest:
    """One bundle. ``weights`` is None only in a code-only bundle."""

    format_version: int
    abi_version: int
    sinterlm_version: str
    target: str  #: "cpu", or a GPU such as "gfx942"
    isa: str
    dtype: str  #: "bf16" | "fp32"
    quantization: str | None  #: of most weights: "int8", "int4" or "fp8" and its format
    kv_cache_dtype: str  #: what KV pages hold: dtype, "int8" or "fp8"
    model: str  #: what the user called it
    code_key: str
    weights_key: str
    layout_hash: int
    max_model_len: int  #: tokens
    shape: ModelShape
    constants: Constants
    ops: tuple[OpCost, ...]
    activation_bytes_per_token: int
    activation_bytes_per_row: int
    library: FileRef
    weights: FileRef | None
    text: FileRef | None  #: text.json: tokenizer, chat template, eos ids, generation defaults

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token takes in the KV cache, over all layers."""
        return kv_token_bytes(self.shape, self.kv_cache_dtype)

    @property
    def dtypes(self) -> str:
        """For people: what weights and KV are stored in."""
        return show_dtypes(self.dtype, self.quantization, self.kv_cache_dtype)

    def to_json(self) -> str:
        """JSON text; ``from_json`` gives back an equal manifest."""
        return strict.to_json(self)

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Inverse of ``to_json``. Raises BundleError naming the field that is wrong, or both
        versions where the text is of another format or ABI."""
        try:
            _check_versions(text)
            manifest = strict.from_json(cls, text)
            _check(manifest)
        except ValueError as exc:
            raise BundleError(
                f"manifest.json is damaged or not ours: {exc}; "
                "rebuild the bundle with `sinterlm compile MODEL`"
            ) from exc
        return manifest


def kv_head_bytes(head_dim: int, kv_cache_dtype: str) -> int:
    """Bytes of K, or of V, of one token and KV head. Codes have an fp32 scale beside them."""
    return head_dim + 4 if kv_cache_dtype == "int8" else head_dim * _ELEMENT_BYTES[kv_cache_dtype]


def kv_token_bytes(shape: ModelShape, kv_cache_dtype: str) -> int:
    """Bytes of K and V of one token, over all layers and KV heads."""
    heads = shape.num_layers * shape.num_kv_heads
    return 2 * heads * kv_head_bytes(shape.head_dim, kv_cache_dtype)


def show_dtypes(dtype: str, quantization: str | None, kv_cache_dtype: str) -> str:
    """``bf16``, ``int4 w4g32-a8g64``, ``bf16, KV cache int8``."""
    weights = quantization or dtype
    return weights if kv_cache_dtype == dtype else f"{weights}, KV cache {kv_cache_dtype}"


_ELEMENT_BYTES = {"bf16": 2, "fp32": 4, "fp8": 1}
_FILE_PATH = re.compile(
    r"(\.\./\.\./(code|weights)/[0-9a-f]{64}/)?[A-Za-z0-9_][A-Za-z0-9_.-]{0,80}"
)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def _check_versions(text: str | bytes) -> None:
    """Versions come first: a manifest of another format has other fields."""
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(data, dict):
        raise ValueError("the file is not an object")
    for field, ours in (("format_version", FORMAT_VERSION), ("abi_version", ABI_VERSION)):
        theirs = data.get(field)
        if type(theirs) is int and theirs != ours:
            made_by = data.get("sinterlm_version")
            raise BundleError(
                f"the bundle has {field.replace('_', ' ')} {theirs} (made by SinterLM "
                f"{str(made_by)[:40]}) and this SinterLM reads {ours}; "
                "rebuild it with `sinterlm compile MODEL`"
            )


def _check(manifest: Manifest) -> None:
    """What types cannot say. Raises ValueError."""
    shape, constants = manifest.shape, manifest.constants
    for name, ref in (
        ("library", manifest.library),
        ("weights", manifest.weights),
        ("text", manifest.text),
    ):
        if ref is None:
            continue
        if not _FILE_PATH.fullmatch(ref.path):
            raise ValueError(f"{name}.path {ref.path[:80]!r} leads outside the bundle")
        if not _SHA256.fullmatch(ref.sha256) or ref.nbytes < 0:
            raise ValueError(f"{name} has no valid size and SHA-256")
    for name in shape.__dataclass_fields__:
        value = getattr(shape, name)
        if isinstance(value, int) and not 0 < value < 1 << 31:
            raise ValueError(f"shape.{name} is {value}")
    if not 0 < manifest.max_model_len < 1 << 31:
        raise ValueError(f"max_model_len is {manifest.max_model_len}")
    if manifest.dtype not in ("bf16", "fp32"):
        raise ValueError(f"dtype is {manifest.dtype[:40]!r}")
    if manifest.kv_cache_dtype not in (manifest.dtype, "int8", "fp8"):
        raise ValueError(f"kv_cache_dtype is {manifest.kv_cache_dtype[:40]!r}")
    if manifest.layout_hash < 0 or min(0, *_sizes(manifest)) < 0:
        raise ValueError("a size or hash is negative")
    if len(constants.inv_freq) != shape.head_dim // 2:
        raise ValueError("constants.inv_freq does not have head_dim / 2 numbers")
    if len(constants.windows) != shape.num_layers or min(constants.windows) < 0:
        raise ValueError("constants.windows does not have one length per layer")
    if not all(math.isfinite(f) for f in constants.inv_freq):
        raise ValueError("constants.inv_freq holds a number that is not finite")


def _sizes(manifest: Manifest) -> list[int]:
    """Every count of bytes and flops."""
    sizes = [manifest.activation_bytes_per_token, manifest.activation_bytes_per_row]
    for op in manifest.ops:
        sizes += [v for k, v in vars(op).items() if isinstance(v, int) and k != "layer"]
    return sizes
