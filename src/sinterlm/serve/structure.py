"""Which constraint a request puts on its text: response_format, structured_outputs, guided_*, or a
tool that must be called. At most one; a second is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from sinterlm.serve.errors import bad_request
from sinterlm.serve.protocol.shared import (
    GenerationRequest,
    ResponseFormat,
    StructuredOutputsFields,
)

Kind = Literal["json", "json_object", "regex", "choice", "grammar"]


class Constraint(msgspec.Struct, frozen=True):
    """One constraint and the field it came from."""

    kind: Kind
    value: Any
    field: str


def constraint_of(request: GenerationRequest) -> Constraint | None:
    """What the request's fields ask for. Raises ApiError 400."""
    found = list(_constraints(request))
    if len(found) > 1:
        raise bad_request(
            f"{found[1].field} and {found[0].field} are both given; give one constraint",
            param=found[1].field,
        )
    return found[0] if found else None


def _constraints(request: GenerationRequest) -> Iterator[Constraint]:
    if request.response_format is not None:
        yield from _from_format(request.response_format)
    if request.structured_outputs is not None:
        yield _from_structured(request.structured_outputs)
    for kind in ("json", "regex", "choice", "grammar"):
        field = f"guided_{kind}"
        value = getattr(request, field)
        if value is not None:
            yield Constraint(kind, value, field)


def _from_format(form: ResponseFormat) -> Iterator[Constraint]:
    field = "response_format"
    if form.type not in ("text", "json_object", "json_schema"):
        raise bad_request(
            f"{field}.type={form.type[:40]!r} is none of text, json_object, json_schema",
            param=f"{field}.type",
            code="unsupported_value",
        )
    if (form.json_schema is not None) != (form.type == "json_schema"):
        raise bad_request(
            f"{field}.json_schema belongs to type json_schema, and is needed there",
            param=f"{field}.json_schema",
        )
    if form.type == "json_object":
        yield Constraint("json_object", True, field)
    elif form.json_schema is not None:
        if form.json_schema.schema is None:
            raise bad_request(
                f"{field}.json_schema.schema is missing",
                param=f"{field}.json_schema.schema",
                code="missing_required_parameter",
            )
        yield Constraint("json", form.json_schema.schema, field)


def _from_structured(given: StructuredOutputsFields) -> Constraint:
    field = "structured_outputs"
    for name in ("structural_tag", "whitespace_pattern"):
        if getattr(given, name) is not None:
            raise _unsupported(f"{field}.{name}")
    for name in ("disable_any_whitespace", "disable_additional_properties"):
        if getattr(given, name):
            raise _unsupported(f"{field}.{name}")
    kinds: tuple[Kind, ...] = ("json", "json_object", "regex", "choice", "grammar")
    found = [
        Constraint(kind, value, field)
        for kind in kinds
        if (value := getattr(given, kind)) is not None and not (kind == "json_object" and not value)
    ]
    if len(found) != 1:
        raise bad_request(
            f"{field} needs exactly one of {', '.join(kinds)}, and {len(found)} are given",
            param=field,
        )
    return found[0]


def _unsupported(field: str) -> Exception:
    return bad_request(
        f"{field} is not supported; use json, json_object, regex, choice or grammar",
        param=field,
        code="unsupported_parameter",
    )
