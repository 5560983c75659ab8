"""What of a grammar would take too long: found in its text, before it is compiled.

The grammar library bounds its own work by fuel, but not all of it: counted repeats, multiples,
long chains of rules and wide objects cost it seconds, or its stack. Refuses those by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from sinterlm.errors import UsageError

#: Copies of a regex's parts that counted repeats may make, nested ones multiplied.
MAX_REPEATS = 10_000
#: Rules of a grammar and references of a schema: the library recurses once for each of a chain,
#: taking about 7 KB of stack.
MAX_RULES = 300
#: Least common multiple of a schema's ``multipleOf``, decimal points aside: states of a machine.
MAX_MULTIPLE = 10_000
#: Properties of one object, and those of them that may be left out: compiling is quadratic in the
#: first, a step linear in the second.
MAX_PROPERTIES, MAX_OPTIONAL = 500, 200

_COUNT = re.compile(r"\{(\d+)?(?:,(\d+)?)?\}")
_RULE = re.compile(r"^\s*[?!]?[A-Za-z_][\w-]*[^:\n\"/]*:", re.MULTILINE)
_LARK_REPEAT = re.compile(r"~\s*(\d+)(?:\s*\.\.\s*(\d+))?")


def check_regex(name: str, regex: str) -> None:
    """Raise UsageError when counted repeats multiply beyond MAX_REPEATS."""
    if regex_copies(regex) > MAX_REPEATS:
        raise UsageError(
            f"structured_outputs.{name} repeats its parts more than {MAX_REPEATS} times in all; "
            "use * or + instead of large counts"
        )


def check_grammar(grammar: str) -> None:
    """Raise UsageError for a grammar of too many rules or repeats."""
    num_rules = len(_RULE.findall(grammar)) + grammar.count("::=")
    if num_rules > MAX_RULES:
        raise UsageError(
            f"structured_outputs.grammar has {num_rules} rules; at most {MAX_RULES} are taken"
        )
    for inline in _inline_schemas(grammar):
        check_schema(inline)
    # Rules can repeat each other, so all counts are multiplied, wherever they stand.
    counts = [max(int(a or 0), int(b or 0)) for a, b in _COUNT.findall(grammar)]
    counts += [max(int(a), int(b or 0)) for a, b in _LARK_REPEAT.findall(grammar)]
    if _product(counts, 10 * MAX_REPEATS) > 10 * MAX_REPEATS:
        raise UsageError(
            f"structured_outputs.grammar repeats its parts more than {10 * MAX_REPEATS} times if "
            "every count is multiplied; use * or + instead of large counts"
        )


def check_schema(schema: str) -> None:
    """Raise UsageError for a JSON schema with a part that is too large to compile."""
    multiple, num_references = 1, 0
    for part in _objects(json.loads(schema)):
        num_references += "$ref" in part
        if num_references > MAX_RULES:
            raise UsageError(
                f"structured_outputs.json has more than {MAX_RULES} $ref; write parts out instead"
            )
        pattern = part.get("pattern")
        if isinstance(pattern, str):
            check_regex("json: pattern", pattern)
        _check_members(part)
        multiple = math.lcm(multiple, _digits(part.get("multipleOf")))
        if multiple > MAX_MULTIPLE:
            raise UsageError(
                "structured_outputs.json: multipleOf asks for too large a multiple; the least "
                f"common one, decimal points aside, may be {MAX_MULTIPLE}"
            )


def _check_members(part: dict[str, Any]) -> None:
    """Refuse an object of too many properties."""
    patterns, members, required = (
        part.get(name) for name in ("patternProperties", "properties", "required")
    )
    for key in patterns if isinstance(patterns, dict) else ():
        check_regex("json: patternProperties", key)
    if not isinstance(members, dict):
        return
    optional = set(members).difference(required if isinstance(required, list) else ())
    for count, limit, what in (
        (len(members), MAX_PROPERTIES, "properties"),
        (len(optional), MAX_OPTIONAL, "properties that are not required"),
    ):
        if count > limit:
            raise UsageError(
                f"structured_outputs.json: an object has {count} {what}; at most {limit} are taken"
            )


def regex_copies(regex: str) -> int:
    """How many copies of parts the counted repeats of ``regex`` make; nested ones multiply.

    Literals count as nothing: only what ``{n,m}`` multiplies matters.
    """
    open_groups = [0]  # copies made inside each open group so far
    last = 0  # copies inside the part that a following count repeats
    position = 0
    while position < len(regex):
        char = regex[position]
        count = _COUNT.match(regex, position) if char == "{" else None
        if count is not None and count.group(0) not in ("{}", "{,}"):
            times = max(int(group or 0) for group in count.groups())
            open_groups[-1] += times * (last + 1) - last
            last = times * (last + 1)
            position = count.end()
            continue
        if char == "(":
            open_groups.append(0)
            last = 0
        elif char == ")" and len(open_groups) > 1:
            last = open_groups.pop()
            open_groups[-1] += last
        elif char in "*+?":
            pass  # what it repeats may be repeated again
        else:
            last = 0
            position = _end_of_atom(regex, position) - 1
        position += 1
    return sum(open_groups)


def _end_of_atom(regex: str, start: int) -> int:
    """Where the character, escape or class at ``start`` ends; braces inside are no counts."""
    if regex[start] == "\\":
        end = start + 2
        if regex[start + 1 : start + 2] in ("p", "P", "x", "u") and regex[end : end + 1] == "{":
            closing = regex.find("}", end)
            end = closing + 1 if closing >= 0 else end
        return end
    if regex[start] != "[":
        return start + 1
    position = start + 1
    if regex[position : position + 1] == "^":
        position += 1
    if regex[position : position + 1] == "]":
        position += 1
    while position < len(regex) and regex[position] != "]":
        position += 2 if regex[position] == "\\" else 1
    return position + 1


def _inline_schemas(grammar: str) -> Iterator[str]:
    """The JSON schemas written as ``%json {...}``; what is no JSON is left to the compiler."""
    for match in re.finditer(r"%json\s*", grammar):
        try:
            schema, _ = json.JSONDecoder().raw_decode(grammar, match.end())
        except (ValueError, RecursionError):
            continue
        yield json.dumps(schema)


def _objects(schema: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object anywhere in ``schema``."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _digits(number: object) -> int:
    """The digits of a decimal number as an integer, trailing zeros aside: 0.25 -> 25, 1e3 -> 1."""
    if isinstance(number, bool) or not isinstance(number, int | float) or number == 0:
        return 1
    digits = Decimal(str(number)).normalize().as_tuple().digits
    return int("".join(map(str, digits)) or "1") or 1


def _product(counts: list[int], enough: int) -> int:
    """The product of counts above 1, or any number above ``enough`` once it is passed."""
    product = 1
    for count in counts:
        product *= max(1, count)
        if product > enough:
            break
    return product
