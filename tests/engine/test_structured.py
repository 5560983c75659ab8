"""What StructuredOutputs takes and refuses, and what would take too long to compile."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sinterlm.engine.grammar_limits import regex_copies
from sinterlm.engine.sampling import SamplingParams
from sinterlm.engine.structured import MAX_CHOICES, StructuredOutputs
from sinterlm.errors import UsageError


def test_equal_wishes_are_equal_and_keep_the_order_of_properties() -> None:
    schema = {"type": "object", "properties": {"z": {}, "a": {"const": "ü"}}}
    one, other = StructuredOutputs(json=schema), StructuredOutputs(json=json.dumps(schema))
    assert one == other and hash(one) == hash(other) and one.kind == "json"
    assert isinstance(one.json, str) and one.json.index("z") < one.json.index('"a"')
    assert StructuredOutputs(json=True).json == "{}"
    assert StructuredOutputs(choice=["b", "a", "b"]).choice == ("b", "a")
    assert StructuredOutputs(json_object=True).kind == "json_object"


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({}, "exactly one of json, json_object, regex, choice, grammar; none is given"),
        ({"regex": "a", "choice": ["b"]}, "regex and choice is given"),
        ({"json": {}, "json_object": True}, "json and json_object is given"),
        ({"json": '{"a'}, "json is no JSON"),
        ({"json": "[" * 50_000}, "json is no JSON"),
        ({"json": [1]}, "json must be a schema object, not list"),
        ({"json": "3"}, "json must be a schema object, not int"),
        ({"json": False}, "no text satisfies"),
        ({"json": {"a": float("nan")}}, "json is no JSON"),
        ({"json": {"a": object()}}, "json is no JSON"),
        ({"json": {"a": "x" * (1 << 17)}}, "json has .* bytes; at most 131072"),
        ({"json_object": 1}, "json_object must be True or False"),
        ({"regex": ""}, "regex must not be empty"),
        ({"regex": 3}, "regex must be a text, not int"),
        ({"regex": "a\ud800"}, "regex holds no Unicode character at 1"),
        ({"regex": "a" * 20_000}, "regex has 20000 bytes; at most 16384"),
        ({"choice": []}, "choice must be a list of at least one text"),
        ({"choice": "ab"}, "choice must be a list"),
        ({"choice": ["a", ""]}, r"choice\[1\] must be a text that is not empty"),
        ({"choice": [str(i) for i in range(MAX_CHOICES + 1)]}, "choice has 10001 texts"),
        ({"grammar": "x" * 70_000}, "grammar has 70000 bytes"),
        ({"regex": "a", "disable_any_whitespace": True}, "belong to json and json_object; regex"),
        ({"json": {}, "disable_any_whitespace": True, "whitespace_pattern": " "}, "contradicts"),
        ({"json": {}, "disable_any_whitespace": "no"}, "disable_any_whitespace must be True"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=f"structured_outputs.*{match}"):
        StructuredOutputs(**fields)


def test_sampling_params_refuse_what_contradicts() -> None:
    wanted = StructuredOutputs(regex="a+")
    assert SamplingParams(structured_outputs=wanted, logit_bias={3: -100.0})
    with pytest.raises(UsageError, match="logit_bias of -inf contradicts structured_outputs"):
        SamplingParams(structured_outputs=wanted, logit_bias={3: -float("inf")})
    with pytest.raises(UsageError, match=r"bad_words.* contradicts structured_outputs"):
        SamplingParams(structured_outputs=wanted, bad_words=["a"])
    with pytest.raises(UsageError, match="structured_outputs"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("regex", "copies"),
    [
        ("abc+(d|e)*", 0), ("a{100}", 100), ("a{2,30}", 30), ("a{,5}", 5), ("a{3,}", 3),
        ("(a{10}b){10}", 110), ("((a{9}){9}){9}", 819), ("[0-9]{4}-[0-9]{2}-[0-9]{2}", 8),
        ("[{3}]", 0), (r"\{3}", 0), (r"\p{L}x", 0), (r"\p{L}{2}", 2), (r"\x{41}{7}", 7),
        ("[]{]{3}", 3), ("[^]{]{3}", 3), (r"[\]{]{3}", 3), ("{}", 0), (")a{4}", 4), ("[a{3}", 0),
        ("(a{100}?){100}", 10100), ("a{10}{10}", 110),
    ],
)  # fmt: skip
def test_copies_that_counts_make(regex: str, copies: int) -> None:
    assert regex_copies(regex) == copies
