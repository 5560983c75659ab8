"""What the server does with each field of a request: the one table behind checking and docs.

A field carries its rule where it is declared, as ``Annotated[type, effect("…")]``. There are three:
it has an effect; it is accepted because it could not change the answer; or it is refused, and only
values that ask for nothing are let through.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import msgspec

from sinterlm.serve.errors import bad_request


class Status(str, enum.Enum):
    """What becomes of a field."""

    EFFECT = "effect"
    ACCEPTED = "accepted"
    REFUSED = "refused"


@dataclass(frozen=True)
class FieldRule:
    """One row of the table."""

    name: str
    status: Status
    meaning: str  #: one line: the effect, why there is none, or what to use instead
    neutral: tuple[object, ...] = ()  #: of a refused field: values that ask for nothing, null aside


def effect(meaning: str) -> msgspec.Meta:
    """The field changes the answer."""
    return _meta(Status.EFFECT, meaning)


def accepted(meaning: str) -> msgspec.Meta:
    """The field is read and cannot change the answer; ``meaning`` says why not."""
    return _meta(Status.ACCEPTED, meaning)


def refused(meaning: str, *neutral: object) -> msgspec.Meta:
    """The field asks for what we do not do, unless it is null or a ``neutral`` value."""
    return _meta(Status.REFUSED, meaning, neutral)


def _meta(status: Status, meaning: str, neutral: tuple[object, ...] = ()) -> msgspec.Meta:
    schema: dict[str, object] = {"x-status": status.value}
    if status is Status.REFUSED:
        schema["enum"] = [None, *neutral]
    return msgspec.Meta(
        description=meaning,
        extra_json_schema=schema,
        extra={"status": status, "neutral": neutral},
    )


@cache
def described(kind: type[msgspec.Struct]) -> msgspec.inspect.StructType:
    """The declaration of a struct as msgspec reads it: a pure function that takes 30 ms."""
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    return info


def rules_of(kind: type[msgspec.Struct]) -> tuple[FieldRule, ...]:
    """The table of one kind of request, in the order of declaration."""
    return tuple(_rule(field) for field in described(kind).fields)


def _rule(field: msgspec.inspect.Field) -> FieldRule:
    kind = field.type
    assert isinstance(kind, msgspec.inspect.Metadata), f"{field.name} has no rule"
    assert kind.extra is not None and kind.extra_json_schema is not None
    meaning = str(kind.extra_json_schema["description"])
    return FieldRule(field.encode_name, kind.extra["status"], meaning, kind.extra["neutral"])


def refuse_unsupported(request: msgspec.Struct, rules: Iterable[FieldRule]) -> None:
    """Raise a 400 naming the first refused field that asks for something."""
    for rule in rules:
        if rule.status is not Status.REFUSED:
            continue
        value = getattr(request, rule.name)
        if value is None or any(value == n and type(value) is type(n) for n in rule.neutral):
            continue
        raise bad_request(
            f"{rule.name}={value!r} is not supported: {rule.meaning}",
            param=rule.name,
            code="unsupported_parameter",
        )
