"""Dataclasses to JSON and back, strictly: a missing, extra, repeated or ill-typed field is named.

Knows int, float, str, ``X | None``, ``tuple[X, ...]`` and nested frozen dataclasses. Refuses
non-finite numbers. Raises ValueError; callers turn it into the error of their file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")

_INT_LIMIT = 1 << 64


def to_json(value: object) -> str:
    """A frozen dataclass as indented JSON with sorted keys. Raises ValueError for inf and nan."""
    return json.dumps(
        dataclasses.asdict(typing.cast(Any, value)), sort_keys=True, indent=1, allow_nan=False
    )


def from_json(cls: type[T], text: str | bytes) -> T:
    """Inverse of ``to_json``. Raises ValueError naming the offending field."""
    try:
        data = json.loads(text, object_pairs_hook=_no_repeats, parse_constant=_no_constants)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return typing.cast(T, _decode(cls, data, ""))


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return found


def _no_constants(name: str) -> Any:
    raise ValueError(f"{name} is not a number we accept")


def _decode(kind: Any, data: Any, where: str) -> Any:
    """``data`` as ``kind``; ``where`` is the path of the field, for messages."""
    if dataclasses.is_dataclass(kind):
        return _decode_object(kind, data, where)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if data is None:
            return None
        return _decode(next(a for a in args if a is not type(None)), data, where)
    if origin is tuple:
        if not isinstance(data, list):
            raise ValueError(f"{where} is {_name(data)}, not a list")
        return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    return _decode_scalar(kind, data, where)


def _decode_object(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{where or 'the file'} is {_name(data)}, not an object")
    hints = typing.get_type_hints(kind)
    names = {f.name for f in dataclasses.fields(kind)}
    missing, extra = sorted(names - set(data)), sorted(set(data) - names)
    if missing or extra:
        fault = f"lacks {missing[0]!r}" if missing else f"has an unknown field {extra[0][:80]!r}"
        raise ValueError(f"{where or 'the file'} {fault}")
    dot = f"{where}." if where else ""
    return kind(**{n: _decode(hints[n], data[n], dot + n) for n in sorted(names)})


def _decode_scalar(kind: Any, data: Any, where: str) -> Any:
    if kind is float and type(data) in (int, float):
        if not -1e308 < data < 1e308 or not math.isfinite(data):
            raise ValueError(f"{where} is not a finite number")
        return float(data)
    if type(data) is not kind:
        raise ValueError(f"{where} is {_name(data)}, not {kind.__name__}")
    if kind is int and not -_INT_LIMIT < data < _INT_LIMIT:
        raise ValueError(f"{where} is out of range")
    return data


def _name(data: Any) -> str:
    return "null" if data is None else type(data).__name__
