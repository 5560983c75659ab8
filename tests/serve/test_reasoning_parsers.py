"""Reasoning parsers: where the reasoning ends, and that cutting the text changes nothing."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinterlm.errors import UsageError
from sinterlm.serve.parsers import (
    REASONING_PARSERS,
    choose_reasoning_parser,
    reasoning_parser,
    starts_inside,
)


def parse(name: str, pieces: Iterable[str], inside: bool | None = None) -> tuple[str, str]:
    """Reasoning and content of an answer that arrives in ``pieces``."""
    parser = reasoning_parser(name, starts_inside=inside)
    reasoning = content = ""
    for delta in [*map(parser.push, pieces), parser.finish()]:
        assert not (delta.reasoning and content), "reasoning after content"
        reasoning += delta.reasoning
        content += delta.content
    return reasoning, content


@pytest.mark.parametrize("name", REASONING_PARSERS)
@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", "\nHm.\n", "\n\nYes."),
        ("Hm.</think>Yes.", "Hm.", "Yes."),
        ("<think>Hm.</think>", "Hm.", ""),
        ("Hm.", "Hm.", ""),
        ("\n\n</think>Yes.", "", "Yes."),
        ("<think>\n\n</think>\n\nYes.", "", "\n\nYes."),
        ("Hm. </thin", "Hm. </thin", ""),
        ("Hm.</think>Yes <think>no</think>", "Hm.", "Yes <think>no</think>"),
        ("", "", ""),
    ],
)
def test_inside_from_the_start(name: str, text: str, reasoning: str, content: str) -> None:
    """As when the prompt ends with ``<think>``."""
    assert parse(name, [text], inside=True) == (reasoning, content)


@pytest.mark.parametrize("name", ["deepseek_r1", "qwq"])
def test_these_reason_unless_the_prompt_closed_it(name: str) -> None:
    assert parse(name, ["Hm.</think>Yes."]) == ("Hm.", "Yes.")
    assert parse(name, ["Yes."], inside=False) == ("", "Yes.")
    assert parse(name, [" <think>Hm.</think>Yes."], inside=False) == ("Hm.", "Yes.")


def test_qwen3_reasons_only_where_it_was_opened() -> None:
    assert parse("qwen3", ["Yes."]) == ("", "Yes.")
    assert parse("qwen3", ["\n\n"]) == ("", "\n\n")
    assert parse("qwen3", ["\n<think>Hm.</think>Yes."]) == ("Hm.", "Yes.")
    assert parse("qwen3", ["<thinking>"]) == ("", "<thinking>")


def test_qwen3_calls_a_tool_without_closing_its_reasoning() -> None:
    assert parse("qwen3", ["<think>Hm.<tool_call>{}"]) == ("Hm.", "<tool_call>{}")
    assert parse("deepseek_r1", ["Hm.<tool_call>{}"]) == ("Hm.<tool_call>{}", "")


def test_reasoning_streams() -> None:
    parser = reasoning_parser("qwq", starts_inside=True)
    assert parser.push("Let me").reasoning == "Let me"
    assert parser.push(" see</").reasoning == " see"
    delta = parser.push("think>Yes")
    assert (delta.reasoning, delta.content) == ("", "Yes")


TEXTS = st.lists(
    st.sampled_from(["<think>", "</think>", "<tool_call>", "<th", "</", "ink>", "\n", " ", "x"]),
    max_size=10,
).map("".join)


@given(
    name=st.sampled_from(sorted(REASONING_PARSERS)),
    inside=st.sampled_from([None, True, False]),
    text=TEXTS,
    data=st.data(),
)
def test_any_cut_gives_the_same(
    name: str, inside: bool | None, text: str, data: st.DataObject
) -> None:
    whole = parse(name, [text], inside)
    assert parse(name, text, inside) == whole
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(name, pieces, inside) == whole


def test_the_prompt_tells_where_an_answer_starts() -> None:
    assert starts_inside("<|im_start|>assistant\n<think>\n") is True
    assert starts_inside("<|im_start|>assistant\n<think>\n\n</think>\n\n") is False
    assert starts_inside("<|im_start|>assistant\n") is None


def test_auto_follows_the_template() -> None:
    assert choose_reasoning_parser("auto", "{{ content.split('</think>') }}") == "qwen3"
    assert choose_reasoning_parser("auto", "{{ messages }}") is None
    assert choose_reasoning_parser("auto", None) is None
    assert choose_reasoning_parser("none", "<think>") is None
    assert choose_reasoning_parser("qwq", None) == "qwq"
    with pytest.raises(UsageError, match="reasoning_parser='r1' is none of auto, none, deepseek"):
        choose_reasoning_parser("r1", None)
