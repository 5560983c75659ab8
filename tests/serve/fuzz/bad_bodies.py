"""Bodies that are wrong in one way each, drawn from a seed, with the field an error must name."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"

#: Fields of both kinds of request, by what belongs there.
NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty",
           "repetition_penalty")  # fmt: skip
INTEGERS = ("seed", "n", "max_tokens", "top_k", "min_tokens", "priority")
BOOLEANS = ("stream", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output")
LISTS = ("stop_token_ids", "allowed_token_ids")
RANGES = {
    "temperature": (-0.5, -1, -1e9), "top_p": (-0.1, 0, 1e-46, 1.5, 2), "min_p": (-0.2, 1.1, 7),
    "presence_penalty": (-2.5, 3, 100), "frequency_penalty": (-2.1, 2.5, 50),
    "repetition_penalty": (-1, 0), "n": (0, -1, 10**6), "max_tokens": (-1, -100),
    "min_tokens": (-1, -7),
}  # fmt: skip


@dataclass(frozen=True)
class BadBody:
    """One body, where it goes, and what an error must say."""

    category: str
    path: str
    body: bytes
    field: str | None  #: part of error.param or message; None where the body is no JSON object

    def __str__(self) -> str:
        return f"{self.category}: {self.path} {self.body[:200]!r}"


def _base(draw: random.Random) -> tuple[str, dict[str, Any]]:
    if draw.random() < 0.6:
        return CHAT, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    return COMPLETIONS, {"prompt": "hi", "max_tokens": 2}


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def _of_type(draw: random.Random, *but: type) -> Any:
    values: list[Any] = ["text", "", "12", [], [[]], {}, {"a": 1}, True, 1.5, 7]
    return draw.choice([v for v in values if type(v) not in but])


def wrong_type(draw: random.Random) -> BadBody:
    """A value of another type than the field's."""
    path, body = _base(draw)
    fields: dict[str, tuple[type, ...]] = {
        **dict.fromkeys(NUMBERS, (float, int)), **dict.fromkeys(INTEGERS, (int,)),
        **dict.fromkeys(BOOLEANS, (bool,)), **dict.fromkeys(LISTS, (list,)),
        "stop": (str, list), "logit_bias": (dict,), "model": (str,), "stream_options": (dict,),
    }  # fmt: skip
    name = draw.choice(sorted(fields))
    return BadBody("wrong type", path, _dump({**body, name: _of_type(draw, *fields[name])}), name)


def out_of_range(draw: random.Random) -> BadBody:
    """A number beyond its bounds."""
    path, body = _base(draw)
    name = draw.choice(sorted(RANGES))
    value = draw.choice(RANGES[name])
    return BadBody("out of range", path, _dump({**body, name: value}), name)


def huge_number(draw: random.Random) -> BadBody:
    """An integer that no field holds, or a float that is none."""
    path, body = _base(draw)
    if draw.random() < 0.6:
        name, digits = (
            draw.choice(INTEGERS),
            draw.choice(("9" * 30, "-" + "9" * 40, "1" + "0" * 5000)),
        )
    else:
        name, digits = draw.choice(NUMBERS), draw.choice(("1e400", "-1e999"))
    text = json.dumps({**body, name: "@"}).replace('"@"', digits)
    return BadBody("huge number", path, text.encode(), None if "e" in digits else name)


def no_number(draw: random.Random) -> BadBody:
    """NaN and infinities, which are no JSON."""
    path, body = _base(draw)
    name = draw.choice(NUMBERS)
    word = draw.choice(("NaN", "Infinity", "-Infinity", "nan", "+1", "0x10", "01", "1."))
    return BadBody(
        "no number", path, json.dumps({**body, name: "@"}).replace('"@"', word).encode(), None
    )


def deep_nesting(draw: random.Random) -> BadBody:
    """Lists or objects within one another, far beyond what means anything."""
    path, body = _base(draw)
    depth = draw.choice((100, 1000, 50_000))
    inner = (
        "[" * depth + "]" * depth if draw.random() < 0.5 else '{"a":' * depth + "1" + "}" * depth
    )
    name = draw.choice(("metadata", "logit_bias", "stop", "messages", "nothing"))
    return BadBody(
        "deep nesting", path, json.dumps({**body, name: "@"}).replace('"@"', inner).encode(), None
    )


def invalid_utf8(draw: random.Random) -> BadBody:
    """Bytes that are no UTF-8, or half a surrogate pair, within a text."""
    path, body = _base(draw)
    bad = draw.choice(
        (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x80\x80", b"\xf5\x80\x80\x80", b"\xc0\xaf")
    )
    return BadBody("invalid UTF-8", path, _dump(body).replace(b"hi", b"h" + bad + b"i"), None)


def control_character(draw: random.Random) -> BadBody:
    """A raw control character in a text."""
    path, body = _base(draw)
    raw = bytes([draw.randrange(0x20)])
    return BadBody("control character", path, _dump(body).replace(b"hi", b"h" + raw + b"i"), None)


def unknown_role(draw: random.Random) -> BadBody:
    """A message from nobody, or of no shape."""
    message: Any = draw.choice((
        {"role": "robot", "content": "x"}, {"role": "", "content": "x"}, {"content": "x"},
        {"role": 7, "content": "x"}, {"role": None, "content": "x"}, {"role": ["user"]},
        {"role": "User", "content": "x"}, "user: x", 7, None, [],
    ))  # fmt: skip
    return BadBody(
        "unknown role", CHAT, _dump({"messages": [message], "max_tokens": 2}), "messages"
    )


def foreign_part(draw: random.Random) -> BadBody:
    """A part of a message that a language model cannot take."""
    part: Any = draw.choice((
        {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "file", "file": {"file_id": "f"}}, {"type": "video_url"}, {"type": "nothing"},
        {"text": "no type"}, {"type": "text"}, {"type": "text", "text": 7}, 7, None, [],
    ))  # fmt: skip
    content = [{"type": "text", "text": "look"}, part]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
    return BadBody("foreign part", CHAT, _dump(body), "content")


def no_messages(draw: random.Random) -> BadBody:
    """Messages that are none."""
    value = draw.choice(([], {}, "hi", None, 7, True, [[]]))
    return BadBody("no messages", CHAT, _dump({"messages": value, "max_tokens": 2}), "messages")


def no_prompt(draw: random.Random) -> BadBody:
    """A prompt that is none, or holds tokens that do not exist."""
    value = draw.choice(({}, None, 7, True, [], [[]], [-1], [10**9], ["a", 1], [1, "a"], [[1], "a"],
                         [[10**9]], [1.5], [None]))  # fmt: skip
    return BadBody("no prompt", COMPLETIONS, _dump({"prompt": value, "max_tokens": 2}), "prompt")


def too_long(draw: random.Random) -> BadBody:
    """More text than the context holds, up to 10 MB."""
    text = "word " * draw.choice((20_000, 2_000_000))
    if draw.random() < 0.5:
        body: dict[str, Any] = {"prompt": text, "max_tokens": 2}
        return BadBody("too long", COMPLETIONS, _dump(body), "prompt")
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
    return BadBody("too long", CHAT, _dump(body), "messages")


def unknown_field(draw: random.Random) -> BadBody:
    """A field that nothing reads."""
    path, body = _base(draw)
    name = draw.choice(
        ("temprature", "max_token", "__class__", "Temperature", "streaming", "ü", "a.b")
    )
    return BadBody("unknown field", path, _dump({**body, name: draw.choice((1, "x", None))}), name)


def missing_field(draw: random.Random) -> BadBody:
    """A request without what it is about."""
    path, name = draw.choice(((CHAT, "messages"), (COMPLETIONS, "prompt"), (DETOKENIZE, "tokens")))
    return BadBody("missing field", path, _dump({"model": "smollm2"}), name)


def no_json(draw: random.Random) -> BadBody:
    """A body that is no JSON object at all."""
    path, body = _base(draw)
    whole = _dump(body)
    cut = whole[: draw.randrange(len(whole))]
    other = draw.choice(
        (b"", b"null", b"[]", b"7", b'"x"', b"{", b"{}}", b"\x00", b"hello", b"{'a': 1}")
    )
    garbage = bytes(draw.randrange(256) for _ in range(64))
    return BadBody("no JSON", path, draw.choice((cut, other, garbage, whole + b"x")), None)


def bad_form(draw: random.Random) -> BadBody:
    """Structured outputs that ask for nothing that could be written."""
    path, body = _base(draw)
    form: Any = draw.choice((
        {"regex": "("}, {"choice": []}, {"choice": "a"}, {"grammar": "root ::= ("}, {"json": 7},
        {"json": "{"}, {"regex": "a", "choice": ["a"]}, {}, {"nothing": 1}, "json", 7,
    ))  # fmt: skip
    return BadBody(
        "bad form", path, _dump({**body, "structured_outputs": form}), "structured_outputs"
    )


def bad_tokens(draw: random.Random) -> BadBody:
    """Token ids that are none."""
    value = draw.choice((None, "x", 7, [-1], [10**9], ["a"], [1.5], [[1]], {}))
    return BadBody("bad tokens", DETOKENIZE, _dump({"tokens": value}), "tokens")


def bad_bias(draw: random.Random) -> BadBody:
    """Biases of tokens that do not exist, or beyond bounds."""
    path, body = _base(draw)
    value = draw.choice(({"x": 1}, {"-1": 1}, {"999999999": 1}, {"1": 101}, {"1": -101}, {"1": "a"},
                         {"1": None}, {"1.5": 1}))  # fmt: skip
    return BadBody("bad bias", path, _dump({**body, "logit_bias": value}), "logit_bias")


CATEGORIES: tuple[Callable[[random.Random], BadBody], ...] = (
    wrong_type, out_of_range, huge_number, no_number, deep_nesting, invalid_utf8,
    control_character, unknown_role, foreign_part, no_messages, no_prompt, too_long, unknown_field,
    missing_field, no_json, bad_form, bad_tokens, bad_bias,
)  # fmt: skip
#: Bodies of megabytes are slow to send; a few of them say as much as many.
_RARE = {too_long, deep_nesting}


def bad_bodies(count: int, seed: int = 0) -> Iterator[BadBody]:
    """``count`` bodies, the categories in turn."""
    draw = random.Random(seed)
    made = 0
    while made < count:
        for category in CATEGORIES:
            if category in _RARE and draw.random() > 0.3:
                continue
            yield category(draw)
            made += 1
            if made == count:
                return
