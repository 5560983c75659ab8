"""From the bytes of a body to a typed request, or a 400 that names the field.

Refuses what is no JSON (NaN, bad UTF-8, raw control characters), nesting beyond ``MAX_DEPTH``,
unknown fields (or, told so, logs and drops them) and refused ones.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import re
from collections.abc import Iterator
from typing import Any, Generic, Literal, NoReturn, TypeVar

import msgspec

from sinterlm.serve.errors import ApiError, bad_request
from sinterlm.serve.protocol.fields import described, refuse_unsupported, rules_of

logger = logging.getLogger(__name__)

MAX_DEPTH = 64  #: of nested objects and lists; a JSON schema of a tool is the deepest honest one
_MOST_SHOWN = 40  #: characters of a name a client made up

T = TypeVar("T", bound=msgspec.Struct)

_PLACE = re.compile(r" - at `(?:key in )?\$\.?(.*)`$")
_STEP = re.compile(r"\w+|\[\d+\]")
_MISSING = re.compile(r"Object missing required field `(.*?)`")


class BodyDecoder(Generic[T]):
    """Decodes bodies of one kind of request."""

    def __init__(self, kind: type[T], *, unknown_fields: Literal["error", "warn"]) -> None:
        self._kind = kind
        self._info = described(kind)
        self._rules = rules_of(kind)
        self._lenient = unknown_fields == "warn"

    def decode(self, body: bytes) -> T:
        """The request. Raises ApiError 400."""
        data = _parse(body)
        if not isinstance(data, dict):
            raise bad_request("the body must be a JSON object", param=None, code="invalid_type")
        _check_depth(body, data)
        for where, owner, name, known in list(_unknown(data, self._info, "")):
            if not self._lenient:
                raise _unknown_field(where, name, known)
            logger.warning("unknown field ignored field=%r", _joined(where, name[:_MOST_SHOWN]))
            del owner[name]
        try:
            request = msgspec.convert(data, self._kind)
        except msgspec.ValidationError as exc:
            raise _invalid(str(exc), self._info) from None
        refuse_unsupported(request, self._rules)
        return request


def _parse(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except RecursionError:
        raise _too_deep() from None
    except (msgspec.DecodeError, UnicodeError) as exc:
        _refuse_malformed(body, str(exc))


def _refuse_malformed(body: bytes, reason: str) -> NoReturn:
    """Say which field is at fault: read again, leniently, and look for what JSON does not have."""
    try:
        text = body.decode("utf-8", "surrogateescape")
        data = json.loads(text, strict=False, parse_int=_bounded_int)
    except (ValueError, RecursionError):
        data = None
    for path, value in _leaves(data, "", MAX_DEPTH):
        fault = _fault(value)
        if fault:
            raise bad_request(
                f"{path or 'the body'} {fault}", param=path or None, code="invalid_json"
            )
    raise bad_request(f"the body is not valid JSON: {reason}", param=None, code="invalid_json")


def _bounded_int(digits: str) -> float:
    return int(digits) if len(digits) <= 300 else math.inf


def _fault(value: object) -> str | None:
    """Why a value that a lenient reader accepts is not JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"is {value}: a number must be finite and within 64-bit floating point"
    if isinstance(value, str):
        if any(ord(c) < 0x20 for c in value):
            return "holds a control character that JSON wants escaped, such as \\n"
        if any("\ud800" <= c <= "\udfff" for c in value):
            return "holds bytes that are no UTF-8 or half a surrogate pair"
    return None


def _leaves(value: object, path: str, depth: int) -> Iterator[tuple[str, object]]:
    """Every name and scalar of a value, with its path."""
    if depth == 0:
        return
    if isinstance(value, dict):
        for name, item in value.items():
            if _fault(name):
                yield path, name
            yield from _leaves(item, _joined(path, name[:_MOST_SHOWN]), depth - 1)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{path}[{i}]", depth - 1)
    else:
        yield path, value


def _check_depth(body: bytes, data: Any) -> None:
    # Counting brackets bounds the depth from above at the speed of C; most bodies end here.
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    level = [data]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for value in level
            for item in (value.values() if isinstance(value, dict) else value)
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> ApiError:
    return bad_request(f"the body nests objects and lists more than {MAX_DEPTH} deep", param=None)


def _unknown(
    value: object, info: msgspec.inspect.Type, path: str
) -> Iterator[tuple[str, dict[str, Any], str, list[str]]]:
    """Fields nobody reads: path and object that hold it, its name, and the names there are."""
    if isinstance(info, msgspec.inspect.Metadata):
        yield from _unknown(value, info.type, path)
    elif isinstance(info, msgspec.inspect.UnionType):
        for kind in info.types:
            yield from _unknown(value, kind, path)
    elif isinstance(info, msgspec.inspect.ListType) and isinstance(value, list):
        if _holds_objects(info.item_type):
            for i, item in enumerate(value):
                yield from _unknown(item, info.item_type, f"{path}[{i}]")
    elif isinstance(info, msgspec.inspect.StructType) and isinstance(value, dict):
        kinds = {field.encode_name: field.type for field in info.fields}
        for name, item in value.items():
            if name in kinds:
                yield from _unknown(item, kinds[name], _joined(path, name))
            else:
                yield path, value, name, list(kinds)


def _holds_objects(info: msgspec.inspect.Type) -> bool:
    """Whether a list of these can hold an object with declared fields; token ids cannot."""
    if isinstance(info, msgspec.inspect.UnionType):
        return any(_holds_objects(kind) for kind in info.types)
    return isinstance(info, msgspec.inspect.StructType | msgspec.inspect.Metadata)


def _unknown_field(where: str, name: str, known: list[str]) -> ApiError:
    path = _joined(where, name[:_MOST_SHOWN])
    close = difflib.get_close_matches(name[:_MOST_SHOWN], known, n=1)
    hint = f"did you mean {close[0]}?" if close else "see docs/api.md for the fields there are"
    return bad_request(f"unknown field {path}; {hint}", param=path, code="unknown_parameter")


def _invalid(message: str, info: msgspec.inspect.Type) -> ApiError:
    """msgspec's message, with the path in front as clients know it, and the words there are."""
    found = _PLACE.search(message)
    path = found[1] if found else ""
    reason = message[: found.start()] if found else message
    missing = _MISSING.match(reason)
    if missing:
        path = _joined(path, missing[1])
        return bad_request(f"{path} is missing", param=path, code="missing_required_parameter")
    reason = reason[:1].lower() + reason[1:].replace("`", "")
    words = _words(info, _STEP.findall(path)) if reason.startswith("invalid enum") else []
    if words:
        reason += f", which is none of {', '.join(words)}"
    return bad_request(f"{path}: {reason}", param=path or None, code="invalid_type")


def _words(info: msgspec.inspect.Type, steps: list[str]) -> list[str]:
    """The texts that may stand where ``steps`` lead from a declaration."""
    if isinstance(info, msgspec.inspect.Metadata):
        return _words(info.type, steps)
    if isinstance(info, msgspec.inspect.UnionType):
        return [word for kind in info.types for word in _words(kind, steps)]
    if isinstance(info, msgspec.inspect.LiteralType) and not steps:
        return [str(value) for value in info.values]
    if isinstance(info, msgspec.inspect.ListType) and steps and steps[0].startswith("["):
        return _words(info.item_type, steps[1:])
    if isinstance(info, msgspec.inspect.StructType) and steps:
        kinds = [field.type for field in info.fields if field.encode_name == steps[0]]
        return [word for kind in kinds for word in _words(kind, steps[1:])]
    return []


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
