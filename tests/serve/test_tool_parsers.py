"""Tool parsers: what is a call, what is content, and that cutting the text changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinterlm.errors import UsageError
from sinterlm.serve.parsers import TOOL_PARSERS, choose_tool_parser, tool_parser

Call = tuple[str, str]


def parse(name: str, pieces: Iterable[str]) -> tuple[str, list[Call]]:
    """Content and (name, arguments) of an answer that arrives in ``pieces``."""
    parser, content, calls, ids = tool_parser(name), "", [], set()
    for delta in [*map(parser.push, pieces), parser.finish()]:
        content += delta.content
        for piece in delta.calls:
            if piece.name is not None:
                assert piece.index == len(calls)
                assert piece.id is not None and piece.id.startswith("call_")
                ids.add(piece.id)
                calls.append([piece.name, ""])
            else:
                assert piece.id is None and piece.index == len(calls) - 1 and piece.arguments
            calls[piece.index][1] += piece.arguments
    assert len(ids) == len(calls)
    return content, [(name, arguments) for name, arguments in calls]


def hermes(text: str) -> tuple[str, list[Call]]:
    return parse("hermes", [text])


def llama(text: str) -> tuple[str, list[Call]]:
    return parse("llama3_json", [text])


CALL = '{"name": "weather", "arguments": {"city": "Paris", "days": [1, 2]}}'
ARGUMENTS = '{"city": "Paris", "days": [1, 2]}'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Hello.", "Hello.", []),
        ("", "", []),
        ("\n\n", "\n\n", []),
        (f"<tool_call>\n{CALL}\n</tool_call>", "", [("weather", ARGUMENTS)]),
        (f"\n\n<tool_call>{CALL}</tool_call>\n", "", [("weather", ARGUMENTS)]),
        (f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>", "Let me see.\n",
         [("weather", ARGUMENTS)]),
        (f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "",
         [("weather", ARGUMENTS)] * 2),
        (f"<tool_call>{CALL}\n{CALL}</tool_call>", "", [("weather", ARGUMENTS)] * 2),
        (f"<tool_call>{CALL}", "", [("weather", ARGUMENTS)]),
        (f"<tool_call>{CALL}</tool_call>\nDone.", "\nDone.", [("weather", ARGUMENTS)]),
        (f"<tool_call>{CALL}</tool_call><tool_call>", "<tool_call>", [("weather", ARGUMENTS)]),
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "",
         [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f", "arguments": "Paris"}</tool_call>', "", [("f", '"Paris"')]),
        ('<tool_call>{"id": 7, "name": "f", "arguments": 7, "x": {}}</tool_call>', "",
         [("f", "7")]),
        ('<tool_call>{"name": "f", "arguments": {"code": "a\nb\tc"}}</tool_call>', "",
         [("f", '{"code": "a\\nb\\tc"}')]),
        ('<tool_call>{"name": "f", "arguments": {"t": "</tool_call>"}}</tool_call>', "",
         [("f", '{"t": "</tool_call>"}')]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>x', "x", [("f", '{"a": 1}')]),
    ],
)  # fmt: skip
def test_hermes(text: str, content: str, calls: list[Call]) -> None:
    assert hermes(text) == (content, calls)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call></tool_call>",
        "<tool_call>\n</tool_call>",
        "<tool_call>weather(Paris)</tool_call>",
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"name": 7, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "f" "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [01]}</tool_call>',
        '<tool_call>{"name": "f", "argu',
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
        "a < b, <tool",
        "</tool_call>",
    ],
)
def test_what_is_no_call_is_content(text: str) -> None:
    assert hermes(text) == (text, [])


def test_one_bad_call_does_not_hide_a_good_one() -> None:
    bad = "<tool_call>{bad}</tool_call>"
    assert hermes(f"{bad}<tool_call>{CALL}</tool_call>") == (bad, [("weather", ARGUMENTS)])


def test_arguments_that_stop_being_json_are_all_there() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"q": "say "hi""}}\n</tool_call>ok'
    assert hermes(text) == ("ok", [("f", '{"q": "say "hi""}')])


def test_arguments_cut_by_the_token_limit_are_what_was_drawn() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"q": "sa'
    assert hermes(text) == ("", [("f", '{"q": "sa')])


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
        ('<|python_tag|>{"name": "f", "parameters": {}}', "", [("f", "{}")]),
        ('\n{"type": "function", "name": "f", "arguments": {}}', "", [("f", "{}")]),
        ('{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', "",
         [("f", "{}"), ("g", "{}")]),
        ('Sure. <|python_tag|>{"name": "f", "parameters": {}}', "Sure. ", [("f", "{}")]),
        ('{"name": "f", "parameters": {}} or so', " or so", [("f", "{}")]),
        ('{"name": "f", "parameters": {}};', "", [("f", "{}")]),
        ('{"answer": 42}', '{"answer": 42}', []),
        ('{"name": "Alice", "age": 7}', '{"name": "Alice", "age": 7}', []),
        ('{"name": "Alice"}', '{"name": "Alice"}', []),
        ('Use {"name": "f", "parameters": {}}', 'Use {"name": "f", "parameters": {}}', []),
        ('<|python_tag|>search("x")', '<|python_tag|>search("x")', []),
        ("{", "{", []),
        ("  ", "  ", []),
    ],
)  # fmt: skip
def test_llama3_json(text: str, content: str, calls: list[Call]) -> None:
    assert llama(text) == (content, calls)


def test_arguments_stream() -> None:
    """Each piece of the arguments is handed out by the push that brings it."""
    parser = tool_parser("hermes")
    assert parser.push('<tool_call>{"name": "f", "arguments": ').calls == ()
    pieces = ['{"ci', 'ty": "Pa', 'ris"', "}", "}</tool_call>"]
    got = ["".join(call.arguments for call in parser.push(piece).calls) for piece in pieces]
    assert got == ['{"ci', 'ty": "Pa', 'ris"', "}", ""]


def test_content_is_not_held_longer_than_a_tag_may_begin() -> None:
    parser = tool_parser("hermes")
    assert parser.push("a <").content == "a "
    assert parser.push("b> <tool_").content == "<b> "
    assert parser.push("x").content == "<tool_x"


FRAGMENTS = st.lists(
    st.sampled_from([
        "<tool_call>", "</tool_call>", "<|python_tag|>", "<tool", "{", "}", '{"name": "f"',
        ', "arguments": {', '"parameters": {"a": [1, {"b": null}]}', "\n", " ", ";", '"', "\\", "x",
        '{"name": "g", "arguments": {"k": "v"}}', "7", "[", "]", ":", ",", "}}", "true", "\x01",
        '"\\u00e9"', "é", "</", "nul",
    ]),
    max_size=12,
).map("".join)  # fmt: skip


@given(name=st.sampled_from(sorted(TOOL_PARSERS)), text=FRAGMENTS, data=st.data())
def test_any_cut_gives_the_same(name: str, text: str, data: st.DataObject) -> None:
    whole = parse(name, [text])
    assert parse(name, text) == whole
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(name, pieces) == whole


@given(
    calls=st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8"), min_size=1),
            st.dictionaries(st.text(st.characters(codec="utf-8")), st.integers() | st.text(
                st.characters(codec="utf-8")), max_size=3),
        ),
        max_size=3,
    ),
    is_ascii=st.booleans(),
)  # fmt: skip
def test_what_a_model_means_is_what_comes_out(
    calls: list[tuple[str, dict[str, object]]], is_ascii: bool
) -> None:
    bodies = [
        json.dumps({"name": name, "arguments": arguments}, ensure_ascii=is_ascii)
        for name, arguments in calls
    ]
    text = "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)
    for parsed in (hermes(text), llama("; ".join(bodies))):
        assert parsed[0] == ""
        assert [(name, json.loads(arguments)) for name, arguments in parsed[1]] == calls


def test_nesting_costs_no_call_stack() -> None:
    deep = "[" * 50_000 + "]" * 50_000
    text = f'<tool_call>{{"name": "f", "arguments": {{"a": {deep}}}}}</tool_call>'
    assert hermes(text) == ("", [("f", f'{{"a": {deep}}}')])


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{% if tools %}<tool_call>{% endif %}", "hermes"),
        ("{% if tools %}<tool_call><function=f>{% endif %}", None),
        ('<|start_header_id|>{% if tools %}{"name": …, "parameters": …}', "llama3_json"),
        ("{{ messages }}", None),
        (None, None),
    ],
)
def test_auto_follows_the_template(template: str | None, name: str | None) -> None:
    assert choose_tool_parser("auto", template) == name
    assert choose_tool_parser("none", template) is None
    assert choose_tool_parser("llama3_json", template) == "llama3_json"


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="tool_call_parser='pythonic' is none of auto, none, her"):
        choose_tool_parser("pythonic", None)
