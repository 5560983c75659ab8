"""Rewrites the tables of fields in docs/api.md: what each does, in the words of its declaration.

python scripts/api_docs.py
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sinterlm.serve.protocol.chat import ChatRequest
from sinterlm.serve.protocol.completion import CompletionRequest
from sinterlm.serve.protocol.fields import FieldRule, Status, rules_of
from sinterlm.serve.protocol.tokens import DetokenizeRequest, TokenizeRequest

MARKER = "<!-- Written by scripts/api_docs.py from the declarations; a test compares. -->"

_TITLES = {
    Status.EFFECT: "Fields with an effect",
    Status.ACCEPTED: "Fields accepted without an effect on the answer",
    Status.REFUSED: "Fields that are refused with a 400, unless null or neutral",
}


def field_table() -> str:
    """Three tables of the generating endpoints, then one of /tokenize and /detokenize."""
    chat, text = rules_of(ChatRequest), rules_of(CompletionRequest)
    places: dict[tuple[str, Status, str], list[str]] = {}
    for where, rules in (("chat", chat), ("text", text)):
        for rule in rules:
            places.setdefault((rule.name, rule.status, _meaning(rule)), []).append(where)
    parts = []
    for status, title in _TITLES.items():
        rows = [
            (name, " and ".join(where), meaning)
            for (name, found, meaning), where in places.items()
            if found is status
        ]
        parts.append(f"## {title}\n\n" + _table(("field", "endpoint", "meaning"), sorted(rows)))
    rows = [
        (rule.name, path, rule.meaning)
        for path, kind in (("/tokenize", TokenizeRequest), ("/detokenize", DetokenizeRequest))
        for rule in rules_of(kind)
    ]
    parts.append("## Tokens\n\n" + _table(("field", "endpoint", "meaning"), rows))
    return "\n\n".join(parts)


def _meaning(rule: FieldRule) -> str:
    if rule.status is not Status.REFUSED or not rule.neutral:
        return rule.meaning
    neutral = ", ".join(str(value).lower() if value != "" else '""' for value in rule.neutral)
    return f"{rule.meaning} (neutral: {neutral})"


def _table(head: Iterable[str], rows: Iterable[tuple[str, str, str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---|---|---|"]
    for name, where, meaning in rows:
        lines.append(f"| `{name}` | {where} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def rewritten(page: str) -> str:
    """``page`` with everything behind its marker made anew."""
    head, marker, _ = page.partition(MARKER)
    return f"{head}{marker}\n\n{field_table()}\n"


if __name__ == "__main__":
    path = Path(__file__).resolve().parent.parent / "docs" / "api.md"
    path.write_text(rewritten(path.read_text()))
