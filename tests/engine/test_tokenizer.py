"""Encoding, the beginning-of-sequence token, and chat rendering."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinterlm.artifact.text import TextAssets
from sinterlm.engine.tokenizer import Tokenizer
from sinterlm.errors import CheckpointError, PromptError, UsageError
from tests.engine.texts import BOS, chat_assets, token_id

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("post_bos", "add_bos_token", "added"),
    [
        (False, None, False), (True, None, True), (False, True, True), (True, True, True),
        (False, False, False), (True, False, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("text", ["hello", "", "a" * 50])
def test_bos(post_bos: bool, add_bos_token: bool | None, added: bool, text: str) -> None:
    tokenizer = Tokenizer(chat_assets(post_bos=post_bos, add_bos_token=add_bos_token))
    plain = tokenizer.encode(text, add_special_tokens=False)
    assert token_id(BOS) not in plain
    assert tokenizer.encode(text) == ([token_id(BOS)] if added else []) + plain


def test_text_that_writes_its_own_bos() -> None:
    explicit = Tokenizer(chat_assets(add_bos_token=True))
    assert explicit.encode(BOS + "a").count(token_id(BOS)) == 1
    without = Tokenizer(chat_assets(post_bos=True, add_bos_token=False))
    assert without.encode(BOS + "a").count(token_id(BOS)) == 1


@pytest.mark.parametrize("post_bos", [True, False])
def test_chat_has_the_bos_of_its_template_alone(post_bos: bool) -> None:
    tokenizer = Tokenizer(chat_assets(post_bos=post_bos))
    text = tokenizer.render_chat(MESSAGES)
    assert text == f"{BOS}<|im_start|>user\nhello<|eos|><|im_start|>assistant\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(token_id(BOS)) == 1


def test_no_leftover_truncation() -> None:
    assert len(Tokenizer(chat_assets()).encode("x" * 100)) == 100


def test_without_a_tokenizer() -> None:
    tokenizer = Tokenizer(TextAssets())
    assert not tokenizer.has_vocabulary and tokenizer.token_text(3) is None
    with pytest.raises(UsageError, match="prompt_token_ids"):
        tokenizer.encode("hello")


@pytest.mark.parametrize("source", ["", "{}", "[" * 100_000, '{"model": {"type": "Nonsense"}}'])
def test_damaged_tokenizer(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(TextAssets(tokenizer_json=source))


def test_text_that_is_no_unicode() -> None:
    with pytest.raises(PromptError, match=r"tokenised: character 1 is no Unicode.*UTF-8"):
        Tokenizer(chat_assets()).encode("a\ud800")


def test_ids_beyond_the_vocabulary_decode_to_nothing() -> None:
    tokenizer = Tokenizer(chat_assets())
    assert tokenizer.decode([10**6]) == "" and tokenizer.token_text(10**6) == ""


def test_no_template() -> None:
    tokenizer = Tokenizer(chat_assets(chat_template=None))
    with pytest.raises(UsageError, match="no chat template"):
        tokenizer.render_chat(MESSAGES)
    own = tokenizer.render_chat(MESSAGES, chat_template="{{ messages[0].content }}")
    assert own == "hello"


def test_conventions_of_templates() -> None:
    """trim_blocks, lstrip_blocks, loop controls, tojson, tools, kwargs, generation blocks."""
    template = """
{%- for m in messages %}
    {% if loop.index > 2 %}{% break %}{% endif %}
    {% generation %}
{{ m.content }}
    {% endgeneration %}
{% endfor %}
{{ tools | tojson }}|{{ {'ü': '<'} | tojson(indent=1) }}|{{ thinking ~ 1 ~ nothing }}|{{ none }}"""
    messages = [{"role": "user", "content": c} for c in ("a", "b", "c")]
    text = Tokenizer(chat_assets()).render_chat(
        messages, chat_template=template, tools=[{"n": 1}], chat_template_kwargs={"thinking": True}
    )
    assert text == 'a\nb\n[{"n": 1}]|{\n "ü": "<"\n}|True1|None'


def test_strftime_now_is_there() -> None:
    text = Tokenizer(chat_assets()).render_chat(MESSAGES, chat_template="{{ strftime_now('%Y') }}")
    assert int(text) >= 2024


def test_template_refusing_its_messages() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UsageError, match="roles must alternate"):
        Tokenizer(chat_assets()).render_chat(MESSAGES, chat_template=template)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "empty"),
        ("hello", "list"),
        ([{"content": "a"}], r"messages\[0\].*role"),
        ([*MESSAGES, "hello"], r"messages\[1\]"),
        ([{"role": "user", "content": 7}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "image_url"),
    ],
)
def test_bad_messages(messages: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Tokenizer(chat_assets()).render_chat(messages)  # type: ignore[arg-type]


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    text = Tokenizer(chat_assets()).render_chat(
        [{"role": "user", "content": parts}], chat_template="{{ messages[0].content }}"
    )
    assert text == "a\nb"


def test_reserved_template_kwargs() -> None:
    with pytest.raises(UsageError, match="messages"):
        Tokenizer(chat_assets()).render_chat(MESSAGES, chat_template_kwargs={"messages": []})


@pytest.mark.parametrize("given", [{"chat_template_kwargs": 5}, {"tools": 5}, {"tools": ["f"]}])
def test_template_variables_of_another_type(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(given))):
        Tokenizer(chat_assets()).render_chat(MESSAGES, **given)


@given(text=st.text() | st.text("ab <|start|>é", max_size=200))
def test_no_text_has_fewer_tokens_than_its_length_demands(text: str) -> None:
    tokenizer = Tokenizer(chat_assets())
    most = tokenizer.most_chars(len(tokenizer.encode(text, add_special_tokens=False)))
    assert most is not None
    assert len(text) <= most
