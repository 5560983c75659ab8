"""Text appears token by token exactly as it would all at once; stop strings may span tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinterlm.artifact.text import TextAssets
from sinterlm.engine.text_stream import Detokenizer, TextStream
from sinterlm.engine.tokenizer import Tokenizer
from tests.engine.texts import byte_level_json, chat_assets, sentencepiece_json

BYTES = Tokenizer(chat_assets())
DECODE = BYTES.decode_function(skip_special_tokens=True)
SENTENCE = Tokenizer(TextAssets(tokenizer_json=sentencepiece_json()))

texts = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]), st.sampled_from("aé€😀👩\u200d🚀\ufffd \n")
    ),
    max_size=30,
)


def stream_of(
    stop: tuple[str, ...] = (), *, include: bool = False, eager: bool = True
) -> TextStream:
    return TextStream(DECODE, [], stop, include_stop=include, eager=eager)


@given(texts, texts)
def test_deltas_add_up_to_the_text(prompt: str, text: str) -> None:
    context, ids = BYTES.encode(prompt), BYTES.encode(text)
    detokenizer = Detokenizer(DECODE, context)
    deltas = [detokenizer.push([i]) for i in ids]
    shown = "".join(deltas)
    if "\ufffd" not in text:
        assert "\ufffd" not in shown, "half a character was shown"
    assert shown + detokenizer.flush() == text


@given(st.lists(st.integers(0, 255), max_size=60))
def test_any_bytes_add_up(ids: list[int]) -> None:
    """Sequences that are no UTF-8 at all, in which nothing may be lost or shown twice."""
    detokenizer = Detokenizer(DECODE, [])
    shown = "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush()
    assert shown == BYTES.decode(ids)


def test_a_character_appears_when_it_is_complete() -> None:
    detokenizer = Detokenizer(DECODE, [])
    ids = BYTES.encode("€!")
    assert [detokenizer.push([i]) for i in ids] == ["", "", "€", "!"]


def test_endless_noise_is_shown_at_last() -> None:
    detokenizer = Detokenizer(DECODE, [])
    (half, *_) = BYTES.encode("é")
    assert any(detokenizer.push([half]) for _ in range(80))


def test_space_before_the_first_word_is_kept() -> None:
    ids = SENTENCE.encode("hi hi")
    decode = SENTENCE.decode_function(skip_special_tokens=True)
    detokenizer = Detokenizer(decode, ids[:1])
    assert decode(ids) == "hi hi"
    continued = "".join(detokenizer.push([i]) for i in ids[1:]) + detokenizer.flush()
    assert decode(ids[:1]) + continued == "hi hi"


@given(texts.filter(lambda t: "\ufffd" not in t))
def test_byte_fallback_tokens(text: str) -> None:
    decode = SENTENCE.decode_function(skip_special_tokens=True)
    context = SENTENCE.encode("o")
    ids = SENTENCE.encode(text.replace("▁", ""))
    detokenizer = Detokenizer(decode, context)
    shown = "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush()
    assert shown == decode(context + ids)[len(decode(context)) :]


@settings(max_examples=200)
@given(
    st.text("abc€", max_size=24),
    st.lists(st.text("abc€", min_size=1, max_size=4), min_size=1, max_size=3),
    st.booleans(),
)
def test_stop_strings_cut_where_the_first_one_completes(
    text: str, stops: list[str], include: bool
) -> None:
    stream = stream_of(tuple(stops), include=include)
    deltas, hit = [], None
    for token in BYTES.encode(text):
        hit = stream.push(token, may_stop=True)
        if hit is None:
            deltas.append(stream.take_delta())
        else:
            break
    stream.finish()
    deltas.append(stream.take_delta())
    ends = [(text.index(s) + len(s), text.index(s), s) for s in stops if s in text]
    if ends:
        end, start, stop = min(ends)
        assert hit == stop
        assert stream.text == text[: end if include else start]
    else:
        assert hit is None and stream.text == text
    assert "".join(deltas) == stream.text, "deltas never show what is cut later"


@pytest.mark.parametrize(
    ("stops", "stop", "text"),
    [
        (("lo", "ell"), "ell", "h"),  # both end inside one token: the first to complete
        (("lo", "llo"), "llo", "he"),  # both end together: the longest
        (("hello", "h"), "h", ""),
    ],
)
def test_several_stop_strings_in_one_token(stops: tuple[str, ...], stop: str, text: str) -> None:
    stream = stream_of(stops)
    (hello,) = BYTES.encode("hello")
    assert stream.push(hello, may_stop=True) == stop
    assert stream.text == text


def test_stop_string_over_several_tokens_is_held_back() -> None:
    stream = stream_of(("hello!",))
    seen = []
    for token in BYTES.encode("say hello?"):
        assert stream.push(token, may_stop=True) is None
        seen.append(stream.take_delta())
    assert seen == ["s", "a", "y", " ", "", "hello?"]


def test_stop_string_before_min_tokens_is_let_through() -> None:
    stream = stream_of(("a",))
    assert stream.push(BYTES.encode("a")[0], may_stop=False) is None
    assert stream.push(BYTES.encode("b")[0], may_stop=True) is None
    assert stream.push(BYTES.encode("a")[0], may_stop=True) == "a"
    assert stream.text == "ab"


@given(texts)
def test_late_decoding_gives_the_same_text(text: str) -> None:
    eager, late = stream_of(), stream_of(eager=False)
    for token in BYTES.encode(text):
        eager.push(token, may_stop=True)
        late.push(token, may_stop=True)
    for stream in (eager, late):
        stream.finish()
        stream.finish()
    assert eager.text == late.text == text


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens(skip: bool) -> None:
    ids = BYTES.encode("a<|im_start|>b")
    detokenizer = Detokenizer(BYTES.decode_function(skip_special_tokens=skip), [])
    shown = "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush()
    assert shown == ("ab" if skip else "a<|im_start|>b")
    assert len(byte_level_json()) > 1000
