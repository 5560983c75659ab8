"""StructuredOutputs: what a text must look like. vLLM's names and meanings.

Normalised to text, so that equal wishes are equal and hashable. Refuses what is no JSON, names
nothing or too much, or is larger than a request has reason to be; the grammar itself is checked
where it is compiled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sinterlm.errors import UsageError

Kind = Literal["json", "json_object", "regex", "choice", "grammar"]
KINDS: tuple[Kind, ...] = ("json", "json_object", "regex", "choice", "grammar")

#: Most bytes of a constraint, all its choices together.
MAX_BYTES = {"json": 1 << 17, "regex": 1 << 14, "choice": 1 << 17, "grammar": 1 << 16}
MAX_CHOICES = 10_000


@dataclass(frozen=True)
class Reasoning:
    """The tokens around what a model thinks before it answers; a constraint begins behind it."""

    closing: int  #: the token that ends it
    opening: int | None = None  #: a first token that begins it; None = it has begun in the prompt


@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """Exactly one constraint on the text. Raises UsageError, naming the field, on construction."""

    #: A JSON schema, as an object or as its text; stored as text.
    json: str | Mapping[str, Any] | bool | None = None
    json_object: bool = False  #: any JSON object
    regex: str | None = None  #: matched from the first character to the last
    choice: Sequence[str] | None = None  #: one of these texts; stored as a tuple
    grammar: str | None = None  #: Lark as llguidance takes it, or GBNF/EBNF with a ``root`` rule
    disable_any_whitespace: bool = False  #: JSON without optional whitespace
    whitespace_pattern: str | None = None  #: regex of the whitespace that JSON may have
    #: Free text that comes first; a wish is the same with and without.
    reasoning: Reasoning | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Normalise ``json`` and ``choice``, then check every field."""
        set_field = object.__setattr__
        for name in ("json_object", "disable_any_whitespace"):
            if not isinstance(getattr(self, name), bool):
                raise _bad(name, "must be True or False")
        given = [kind for kind in KINDS if getattr(self, kind) not in (None, False)]
        if self.json is False:
            raise _bad("json", "is the schema false, which no text satisfies")
        if len(given) != 1:
            which = " and ".join(given) or "none"
            raise UsageError(
                f"structured_outputs needs exactly one of {', '.join(KINDS)}; {which} is given"
            )
        if self.json is not None:
            set_field(self, "json", _schema_text(self.json))
        if self.choice is not None:
            set_field(self, "choice", _choices(self.choice))
        for name in ("regex", "grammar", "whitespace_pattern"):
            _check_text(name, getattr(self, name))
        if self.whitespace_pattern is not None and self.disable_any_whitespace:
            raise _bad("whitespace_pattern", "contradicts disable_any_whitespace")
        if given[0] not in ("json", "json_object") and (
            self.whitespace_pattern is not None or self.disable_any_whitespace
        ):
            raise UsageError(
                "structured_outputs.whitespace_pattern and .disable_any_whitespace belong to json "
                f"and json_object; {given[0]} is given"
            )

    @property
    def kind(self) -> Kind:
        """The one that is given."""
        return next(kind for kind in KINDS if getattr(self, kind) not in (None, False))


def _bad(name: str, why: str) -> UsageError:
    return UsageError(f"structured_outputs.{name} {why}")


def _schema_text(schema: object) -> str:
    """The schema as JSON text, its properties in the order given."""
    if isinstance(schema, str):
        _check_text("json", schema)
        try:
            parsed = json.loads(schema)
        except (ValueError, RecursionError) as exc:
            raise _bad("json", f"is no JSON: {exc}") from exc
    else:
        parsed = dict(schema) if isinstance(schema, Mapping) else schema
    if not isinstance(parsed, dict) and parsed is not True:
        raise _bad("json", f"must be a schema object, not {type(parsed).__name__}")
    try:
        text = "{}" if parsed is True else json.dumps(parsed, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as exc:
        raise _bad("json", f"is no JSON: {exc}") from exc
    _check_text("json", text)
    return text


def _choices(choices: object) -> tuple[str, ...]:
    if isinstance(choices, str) or not isinstance(choices, list | tuple) or not choices:
        raise _bad("choice", "must be a list of at least one text")
    if len(choices) > MAX_CHOICES:
        raise _bad("choice", f"has {len(choices)} texts; at most {MAX_CHOICES} are taken")
    for i, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice:
            raise _bad(f"choice[{i}]", "must be a text that is not empty")
    _check_text("choice", "".join(choices))
    return tuple(dict.fromkeys(choices))


def _check_text(name: str, text: object) -> None:
    if text is None:
        return
    if not isinstance(text, str):
        raise _bad(name, f"must be a text, not {type(text).__name__}")
    if not text:
        raise _bad(name, "must not be empty")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as exc:
        raise _bad(name, f"holds no Unicode character at {exc.start}") from exc
    limit = MAX_BYTES.get(name, 1 << 10)
    if size > limit:
        raise _bad(name, f"has {size} bytes; at most {limit} are taken")
