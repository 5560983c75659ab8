"""A hostile chat template neither leaves its sandbox nor takes the process down."""

from __future__ import annotations

import sys
import time
import tracemalloc

import pytest

from sinterlm.engine.tokenizer import chat_template
from sinterlm.engine.tokenizer.chat_template import ChatTemplate
from sinterlm.errors import UsageError

VARIABLES = {"messages": [{"role": "user", "content": "x" * 1000}], "bos_token": "<s>"}

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self._TemplateReference__context }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['datetime'] }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '{0.__class__.__mro__}'|attr('format')(1) }}",
    "{{ (messages|map(attribute='__class__')|list)[0].__mro__ }}",
    "{{ messages.append(1) }}",
    "{% set x = messages[0].update({'role': 'system'}) %}",
    "{{ messages[0].pop('role') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends 'base.html' %}",
    "{{ ().__reduce__() }}",
    "{{ (range|attr('__init__')).__self__ }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_no_way_out(source: str) -> None:
    before = [dict(m) for m in VARIABLES["messages"]]  # type: ignore[union-attr]
    try:
        shown = ChatTemplate(source).render(VARIABLES)
    except UsageError:
        shown = ""
    # jinja renders an attribute that the sandbox hides as undefined, which may print as nothing.
    assert "class" not in shown and "root:" not in shown and "uid=" not in shown, shown
    assert "module" not in shown and "built-in" not in shown
    assert VARIABLES["messages"] == before


BIG = "{% set x = messages[0].content %}"
GREEDY = [
    "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "{% set r = range(9999)|list %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ range(10**9)|list }}",
    "{{ 'a' * 3 * 10**8 }}",
    "{{ [0] * 3 * 10**8 }}",
    "{{ 3 * 10**8 * 'a' }}",
    "{{ 9**(10**7) }}",
    "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}"
    "{% endset %}{% set ns.x = y %}{% endfor %}",
    "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x|tojson }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x|list|string %}"
    "{% endfor %}",
    BIG + "{{ x.replace('x', x).replace('x', x).replace('x', x) }}",
    BIG + "{{ x|replace('x', x)|replace('x', x)|replace('x', x) }}",
    BIG + "{{ x.join(x.join(x.join(x))) }}",
    BIG + "{{ x|join(x)|join(x)|join(x) }}",
    "{{ 'a'.ljust(3 * 10**8) }}",
    "{{ 'a'.center(3 * 10**8) }}",
    "{{ 'a'|center(3 * 10**8) }}",
    "{{ 'a'.zfill(3 * 10**8) }}",
    "{{ '\t'.expandtabs(3 * 10**8) }}",
    "{{ 'a'|indent(3 * 10**8, true) }}",
    "{{ '{:>300000000}'.format(1) }}",
    "{{ '{:>{w}}'.format(1, w=3 * 10**8) }}",
    "{{ '%300000000d' % 1 }}",
    "{{ '%*d' % (3 * 10**8, 1) }}",
    "{{ '%300000000d'|format(1) }}",
    "{{ '%(a)300000000d'|format(a=1) }}",
    "{{ {'a': {'b': 1}}|tojson(indent=10**9) }}",
    "{{ (1).to_bytes(3 * 10**8, 'big') }}",
    "{{ lipsum(10**6) }}",
    "{{ 'a'|wordwrap(10**9, wrapstring='b' * 10**9) }}",
    "{{ range(100000)|map('string')|join('y' * 100000) }}",
    "{{ messages[0].content.translate({120: 'y' * 100000}) }}",
]


@pytest.mark.parametrize("source", GREEDY)
def test_no_way_to_exhaust_the_process(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_EVENTS", 200_000)
    tracemalloc.start()
    start = time.thread_time()
    try:
        with pytest.raises(UsageError):
            ChatTemplate(source).render(VARIABLES)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 256 << 20
    assert time.thread_time() - start < 20


def test_source_size_and_syntax() -> None:
    with pytest.raises(UsageError, match="1048577 characters"):
        ChatTemplate("a" * ((1 << 20) + 1))
    for source in (
        "{% if %}",
        "{{ 1 +",
        "{% frobnicate %}",
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    ):
        with pytest.raises(UsageError, match="does not compile"):
            ChatTemplate(source)


def test_time_is_bounded_and_the_trace_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.02)
    slow = ChatTemplate(
        "{% set r = range(100000)|list %}{% for i in r %}{% if r|sum %}{% endif %}{% endfor %}"
    )
    before = sys.gettrace()
    with pytest.raises(UsageError, match="too long"):
        slow.render(VARIABLES)
    assert sys.gettrace() is before


def test_ordinary_templates_are_untouched() -> None:
    source = (
        "{{ '{} {}'.format('a', 1) }} {{ '%s-%d' % ('b', 2) }} {{ 'a,b'.split(',')|join('+') }} "
        "{{ 'aXa'.replace('X', 'Y')|upper }} {{ ('l1\nl2')|indent(2) }} {{ 7 % 4 + 2 ** 3 * 2 }} "
        "{{ ' x '.strip() ~ 1.5 ~ none }} {{ [1] + [2] }} {{ 'ab' * 2 }} {{ messages|length }} "
        "{{ [{'k': 'v'}]|join(',', attribute='k') }} {{ '%s'|format('z') }} "
        "{{ {'a': 1}.items()|list }}"
    )
    assert ChatTemplate(source).render(VARIABLES) == (
        "a 1 b-2 a+b AYA l1\n  l2 19 x1.5None [1, 2] abab 1 v z [('a', 1)]"
    )


def test_a_long_conversation_stays_within_the_limits() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}U: {{ m.content | trim }}\n"
        "{% else %}A: {{ m.content.split('</think>')[-1].lstrip('\n') }}\n{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "word " * 200}] * 2000
    text = ChatTemplate(source).render({"messages": messages})
    assert text.count("\n") == 2000
