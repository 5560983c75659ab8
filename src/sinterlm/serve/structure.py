"""Which constraint a request puts on its text: response_format, structured_outputs, guided_*, or a
tool that must be called. At most one; a second is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sinterlm.engine.structured import KINDS, Reasoning, StructuredOutputs
from sinterlm.errors import UsageError
from sinterlm.serve.errors import ApiError, bad_request
from sinterlm.serve.protocol.shared import (
    GenerationRequest,
    ResponseFormat,
    StructuredOutputsFields,
)


@dataclass(frozen=True)
class Constraint:
    """What the text must look like, and the field of the request that says so."""

    wanted: StructuredOutputs
    field: str

    def behind(self, reasoning: Reasoning) -> Constraint:
        """The same, once the model has thought."""
        return replace(self, wanted=replace(self.wanted, reasoning=reasoning))

    def error(self, exc: UsageError) -> ApiError:
        """The engine's objection, in terms of the request."""
        return _refusal(self.field, exc)


def constraint(field: str, given: Mapping[str, Any]) -> Constraint:
    """A constraint from fields of StructuredOutputs. Raises ApiError 400."""
    try:
        return Constraint(StructuredOutputs(**given), field)
    except UsageError as exc:
        raise _refusal(field, exc) from exc


def constraint_of(request: GenerationRequest) -> Constraint | None:
    """What the request's fields ask for. Raises ApiError 400."""
    found = list(_constraints(request))
    if len(found) > 1:
        raise bad_request(
            f"{found[1].field} and {found[0].field} are both given; give one constraint",
            param=found[1].field,
        )
    if request.guided_whitespace_pattern is not None and (
        not found or found[0].field != "guided_json"
    ):
        raise bad_request(
            "guided_whitespace_pattern belongs to guided_json", param="guided_whitespace_pattern"
        )
    return found[0] if found else None


def _constraints(request: GenerationRequest) -> Iterator[Constraint]:
    if request.response_format is not None:
        yield from _from_format(request.response_format)
    if request.structured_outputs is not None:
        yield _from_structured(request.structured_outputs)
    if request.guided_json is not None:
        given = {
            "json": request.guided_json,
            "whitespace_pattern": request.guided_whitespace_pattern,
        }
        yield constraint("guided_json", given)
    for kind in ("regex", "choice", "grammar"):
        value = getattr(request, f"guided_{kind}")
        if value is not None:
            yield constraint(f"guided_{kind}", {kind: value})


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
        yield constraint(field, {"json_object": True})
    elif form.json_schema is not None:
        if form.json_schema.schema is None:
            raise bad_request(
                f"{field}.json_schema.schema is missing",
                param=f"{field}.json_schema.schema",
                code="missing_required_parameter",
            )
        yield constraint(f"{field}.json_schema.schema", {"json": form.json_schema.schema})


def _from_structured(given: StructuredOutputsFields) -> Constraint:
    field = "structured_outputs"
    for name in ("structural_tag", "disable_additional_properties"):
        if getattr(given, name) in (None, False):
            continue
        raise bad_request(
            f"{field}.{name} is not supported; use {', '.join(KINDS)}",
            param=f"{field}.{name}",
            code="unsupported_parameter",
        )
    fields = {
        name: value
        for name in (*KINDS, "disable_any_whitespace", "whitespace_pattern")
        if (value := getattr(given, name)) is not None
    }
    return constraint(field, fields)


def _refusal(field: str, exc: UsageError) -> ApiError:
    reason = str(exc).removeprefix("structured_outputs").removeprefix(".")
    return bad_request(f"{field}: {reason}", param=field)
