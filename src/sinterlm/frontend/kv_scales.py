"""Scales of an fp8 KV cache that checkpoints hold beside their weights, one number each: vLLM's
``k_scale`` and ``v_scale``, or one ``kv_scale`` for both, on the layer's attention or its k_proj
and v_proj.

They say what numbers of e4m3fn are times. Refuses what is no positive number, one without the
other, and a layer's told twice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

from sinterlm.errors import CheckpointError
from sinterlm.frontend.coded_tensors import Raw
from sinterlm.frontend.fields import MAX_NUMBER, MIN_NUMBER, show
from sinterlm.frontend.numeric import STORAGE, convert
from sinterlm.frontend.weights import StoredTensor

_NAME = re.compile(r"model\.layers\.(\d{1,5})\.self_attn\.(?:attn\.|[kv]_proj\.)?(k|v|kv)_scale")
KvScaleTensors = dict[tuple[int, str], StoredTensor]  #: by layer, and "k" or "v"


def fold_kv_scales(
    stored: Mapping[str, StoredTensor], num_layers: int
) -> tuple[dict[str, StoredTensor], KvScaleTensors]:
    """All other tensors, and the scales of the model's layers. Raises CheckpointError."""
    plain, found = dict(stored), {}
    names: dict[tuple[int, str], str] = {}
    for name, tensor in stored.items():
        match = _NAME.fullmatch(name)
        if match is None or int(match[1]) >= num_layers:
            continue
        info = tensor.info
        if math.prod(info.shape) != 1 or info.dtype not in STORAGE:
            raise CheckpointError(
                f"{tensor.file}: tensor {show(name)} is {info.dtype}{list(info.shape)}, expected "
                "one number"
            )
        del plain[name]
        for which in match[2]:
            key = int(match[1]), which
            if key in found:
                raise CheckpointError(
                    f"{tensor.file}: tensors {show(names[key])} and {show(name)} are scales of the "
                    "same; download the checkpoint again"
                )
            found[key], names[key] = tensor, name
    for layer, which in found:
        other = "v" if which == "k" else "k"
        if (layer, other) not in found:
            raise CheckpointError(
                f"{found[layer, which].file}: {show(names[layer, which])} has no {other}_scale "
                "beside it; download the checkpoint again"
            )
    return plain, found


def read_kv_scales(
    tensors: KvScaleTensors, num_layers: int, raw: Raw
) -> tuple[tuple[float, float], ...]:
    """(k, v) of every layer; 1 where there are none. Raises CheckpointError."""

    def read(layer: int, which: str) -> float:
        tensor = tensors.get((layer, which))
        if tensor is None:
            return 1.0
        value = float(np.ravel(convert(raw(tensor), tensor.info.dtype, "fp32"))[0])
        if not MIN_NUMBER <= value <= MAX_NUMBER:
            raise CheckpointError(
                f"{tensor.file}: the {which}_scale of layer {layer} is {value}, expected a "
                "positive number; download the checkpoint again"
            )
        return value

    return tuple((read(layer, "k"), read(layer, "v")) for layer in range(num_layers))
