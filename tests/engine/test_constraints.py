"""Constrained output on a fake model: what is drawn fits, ends right, and depends on no other."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sinterlm.artifact.text import TextAssets
from sinterlm.engine.constraints import Grammars
from sinterlm.engine.llm import LLM
from sinterlm.engine.outputs import CompletionOutput
from sinterlm.engine.sampling import SamplingParams
from sinterlm.engine.structured import Reasoning, StructuredOutputs
from sinterlm.engine.tokenizer import Tokenizer
from sinterlm.errors import UsageError
from sinterlm.options import EngineOptions
from tests.engine.fake_bundle import load
from tests.engine.texts import BOS, EOS, IM_START, chat_assets, token_id, vocab_size

PROMPT = {"prompt_token_ids": [3, 4, 5]}
PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Grace"]}, "born": {"enum": [1815, 1906]}},
    "required": ["name", "born"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return load(chat_assets())


def params(wanted: StructuredOutputs, **fields: Any) -> SamplingParams:
    return SamplingParams(
        **{"temperature": 1.0, "seed": 5, "max_tokens": 100, "structured_outputs": wanted, **fields}
    )


def one(llm: LLM, wanted: StructuredOutputs, **fields: Any) -> CompletionOutput:
    return llm.generate(PROMPT, params(wanted, **fields))[0].outputs[0]


@pytest.mark.parametrize("seed", range(5))
def test_each_kind_holds(llm: LLM, seed: int) -> None:
    tight = StructuredOutputs(json=PERSON, disable_any_whitespace=True)
    person = one(llm, tight, seed=seed)
    assert set(json.loads(person.text)) == {"name", "born"} and " " not in person.text
    choices = ["red", "green (really)", 'b"lue\n\\', "ré"]
    assert one(llm, StructuredOutputs(choice=choices), seed=seed).text in choices
    regex = one(llm, StructuredOutputs(regex=r"[ab]{3}\d[x-z]"), seed=seed)
    assert re.fullmatch(r"[ab]{3}\d[x-z]", regex.text)
    lark = one(llm, StructuredOutputs(grammar='start: "yes" | "no" " "* "!"'), seed=seed)
    assert re.fullmatch(r"yes|no *!", lark.text)
    gbnf = one(llm, StructuredOutputs(grammar='root ::= ("a" | "b") "c"\n'), seed=seed)
    assert gbnf.text in ("ac", "bc")
    for output in (person, regex, gbnf):
        assert (output.finish_reason, output.stop_reason) == ("stop", None)


def test_any_json_object_with_a_whitespace_pattern(llm: LLM) -> None:
    wanted = StructuredOutputs(json=PERSON, whitespace_pattern="[ ]")
    assert json.loads(one(llm, wanted).text)


class TestReasoning:
    """Free text comes first, and ends with a token; here one that no text of a grammar has."""

    CLOSING, OPENING = token_id(IM_START), token_id(BOS)

    def grammars(self) -> Grammars:
        return Grammars(Tokenizer(chat_assets()), vocab_size())

    def drawable(self, mask: np.ndarray) -> set[int]:
        return {i for i in range(vocab_size()) if mask[i // 32] >> (i % 32) & 1}

    def follow(self, reasoning: Reasoning | None, *tokens: int) -> tuple[set[int], list[bool]]:
        wanted = StructuredOutputs(choice=["ab"], reasoning=reasoning)
        constraint = self.grammars().constraint(wanted)
        ended = [constraint.advance(token) for token in tokens]
        return self.drawable(constraint.mask), ended

    def test_begun_in_the_prompt(self) -> None:
        first, _ = self.follow(None)
        assert first and self.OPENING not in first
        reasoning = Reasoning(self.CLOSING)
        everything = set(range(vocab_size())) - {token_id(EOS)}
        assert self.follow(reasoning)[0] == everything
        assert self.follow(reasoning, 5, self.OPENING, 7) == (everything, [False] * 3)
        assert self.follow(reasoning, 5, self.CLOSING) == (first, [False] * 2)
        (a,) = first & set(Tokenizer(chat_assets()).encode("a", add_special_tokens=False))
        (b,) = Tokenizer(chat_assets()).encode("b", add_special_tokens=False)
        assert self.follow(reasoning, self.CLOSING, a, b)[1] == [False, False, True]

    def test_begun_by_the_answer_or_not(self) -> None:
        first, _ = self.follow(None)
        reasoning = Reasoning(self.CLOSING, self.OPENING)
        assert self.follow(reasoning)[0] == first | {self.OPENING}
        assert len(self.follow(reasoning, self.OPENING)[0]) == vocab_size() - 1
        assert self.follow(reasoning, self.OPENING, 5, self.CLOSING)[0] == first
        (a,) = Tokenizer(chat_assets()).encode("a", add_special_tokens=False)
        assert self.OPENING not in self.follow(reasoning, a)[0]

    def test_the_answer_fits_whatever_comes_first(self, llm: LLM) -> None:
        wanted = StructuredOutputs(regex=r"[ab]{3}\d", reasoning=Reasoning(self.CLOSING))
        for seed in range(5):
            bias = {self.CLOSING: 4.0}
            output = one(llm, wanted, seed=seed, max_tokens=400, logit_bias=bias)
            at = output.token_ids.index(self.CLOSING)
            answer = llm.tokenizer.decode(list(output.token_ids[at + 1 :]))
            assert re.fullmatch(r"[ab]{3}\d", answer) and output.finish_reason == "stop"

    def test_equal_wishes_share_a_grammar(self) -> None:
        plain = StructuredOutputs(regex="a+")
        assert plain == StructuredOutputs(regex="a+", reasoning=Reasoning(3))


def test_a_text_ends_where_nothing_can_follow(llm: LLM) -> None:
    # Nothing can follow: no further step is taken to draw eos.
    done = one(llm, StructuredOutputs(regex="ab"))
    assert done.text == "ab" and len(done.token_ids) == 2 and done.finish_reason == "stop"
    # More can follow: eos ends it, or max_tokens.
    done = one(llm, StructuredOutputs(regex="a*"), max_tokens=100)
    assert set(done.text) <= {"a"} and done.finish_reason == "stop"
    assert done.token_ids[-1] == token_id(EOS)
    done = one(llm, StructuredOutputs(regex="a+"), max_tokens=3, min_tokens=3)
    assert (done.text, done.finish_reason) == ("aaa", "length")


def test_ignore_eos_and_min_tokens_go_on_for_as_long_as_the_grammar_lets_them(llm: LLM) -> None:
    done = one(llm, StructuredOutputs(regex="a*"), max_tokens=50, ignore_eos=True)
    assert (done.text, done.finish_reason) == ("a" * 50, "length")
    done = one(llm, StructuredOutputs(regex="a{0,7}"), ignore_eos=True)
    assert (done.text, done.finish_reason) == ("a" * 7, "stop")
    done = one(llm, StructuredOutputs(regex="a{0,7}"), min_tokens=5)
    assert 5 <= len(done.text) <= 7 and done.finish_reason == "stop"
    done = one(llm, StructuredOutputs(regex="ab"), min_tokens=5)
    assert (done.text, done.finish_reason) == ("ab", "stop")


def test_min_tokens_yields_where_only_what_it_bars_is_allowed(llm: LLM) -> None:
    b = llm.tokenizer.encode("b", add_special_tokens=False)
    for regex, text in (("ab+", "a"), ("b", "")):
        done = one(llm, StructuredOutputs(regex=regex), min_tokens=5, stop_token_ids=b)
        assert (done.text, done.stop_reason) == (text, b[0])


def test_allowed_token_ids_narrow_what_the_grammar_allows(llm: LLM) -> None:
    a, b = llm.tokenizer.encode("ab", add_special_tokens=False)
    eos = token_id(EOS)
    for seed in range(4):
        done = one(llm, StructuredOutputs(regex="[abc]{9}"), allowed_token_ids=[a, b], seed=seed)
        assert re.fullmatch("[ab]{9}", done.text) and done.finish_reason == "stop"
    # No end token is named: the text goes on for as long as both let it, and ends where it may.
    done = one(llm, StructuredOutputs(regex="a*"), allowed_token_ids=[a, b], max_tokens=50)
    assert (done.text, done.finish_reason) == ("a" * 50, "length")
    done = one(llm, StructuredOutputs(regex="a(cb*)?"), allowed_token_ids=[a, b])
    assert (done.text, done.finish_reason) == ("a", "stop")
    done = one(llm, StructuredOutputs(regex="b+"), allowed_token_ids=[b, eos], max_tokens=200)
    assert done.token_ids[-1] == eos and done.finish_reason == "stop"


def test_allowed_token_ids_and_a_grammar_with_nothing_in_common(llm: LLM) -> None:
    a = llm.tokenizer.encode("a", add_special_tokens=False)
    with pytest.raises(UsageError, match="allowed_token_ids has no token that the grammar allows"):
        one(llm, StructuredOutputs(regex="bc"), allowed_token_ids=a)
    done = one(llm, StructuredOutputs(regex="aac"), allowed_token_ids=a)
    assert (done.text, done.finish_reason) == ("aa", "error")
    assert "allowed_token_ids" in str(done.stop_reason)


def test_stop_strings_end_a_constrained_text(llm: LLM) -> None:
    done = one(llm, StructuredOutputs(regex="abcd"), stop="c")
    assert (done.text, done.stop_reason) == ("ab", "c")


def test_each_of_n_sequences_follows_its_own_copy(llm: LLM) -> None:
    wanted = StructuredOutputs(regex="[ab]{8}")
    outputs = llm.generate(PROMPT, params(wanted, n=4))[0].outputs
    assert all(re.fullmatch("[ab]{8}", done.text) for done in outputs)
    assert len({done.text for done in outputs}) > 1


def test_neighbours_preemption_and_chunks_change_nothing() -> None:
    wanted = [StructuredOutputs(regex="[ab]{30}c"), StructuredOutputs(json=PERSON)] * 4
    prompts = [{"prompt_token_ids": [3 + i] * (4 + 5 * i)} for i in range(8)]
    alone, small = load(chat_assets()), load(
        chat_assets(),
        EngineOptions(
            max_num_seqs=6, max_num_batched_tokens=7, kv_cache_memory_bytes=10 << 11, block_size=16
        ),
    )  # fmt: skip
    expected = [alone.generate(p, params(w))[0] for p, w in zip(prompts, wanted, strict=True)]
    free = SamplingParams(temperature=1.0, seed=1, max_tokens=40, ignore_eos=True)
    mixed = small.generate(
        [p for prompt in prompts for p in (prompt, PROMPT)],
        [s for w in wanted for s in (params(w), free)],
    )
    assert [o.outputs for o in mixed[::2]] == [o.outputs for o in expected]


def test_a_model_without_tokenizer_cannot_be_constrained() -> None:
    with load(TextAssets()) as bare, pytest.raises(UsageError, match="needs a tokenizer"):
        bare.generate({"prompt_token_ids": [1]}, params(StructuredOutputs(regex="a")))


# ---- what is wrong is found before anything runs


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(Tokenizer(chat_assets()), vocab_size())


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"json": {"type": "foo"}}, "json cannot be used: Invalid type: foo"),
        ({"json": {"not": {}}}, r'json cannot be used: Unimplemented keys: \["not"\]'),
        ({"json": {"oneOf": [{}, {}]}}, "oneOf is supported only where"),
        ({"json": {"$ref": "#"}}, "json cannot be used: no text satisfies it"),
        ({"json": {"$ref": "http://localhost/x.json"}}, "json cannot be used"),
        ({"json": {"type": "string", "format": "x"}}, "Unknown format: x"),
        ({"regex": "(a"}, "regex cannot be used: .*unclosed group"),
        ({"regex": "(?=a)b"}, "regex cannot be used"),
        ({"grammar": "start: missing"}, 'grammar cannot be used: .*unknown name: "missing"'),
        ({"grammar": "root ::= missing"}, "grammar is neither Lark nor GBNF"),
        ({"grammar": "hello"}, "grammar cannot be used"),
    ],
)
def test_mistakes_are_named(grammars: Grammars, fields: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=rf"structured_outputs\..*{match}"):
        grammars.prepare(StructuredOutputs(**fields))


def chain(rule: str, last: str, length: int) -> str:
    rules = [rule.format(i, i + 1) for i in range(length)]
    return "\n".join([f"start: {rule[0]}0", *rules, last.format(length)])


def references(make: Callable[[str], Any], length: int) -> dict[str, Any]:
    defs = {f"a{i}": make(f"#/$defs/a{i + 1}") for i in range(length)}
    return {"$ref": "#/$defs/a0", "$defs": {**defs, f"a{length}": {"type": "string"}}}


def deep(length: int) -> str:
    return '{"properties": {"a": ' * length + "{}" + "}}" * length


HOSTILE: dict[str, dict[str, Any]] = {
    "rules": {"grammar": chain("r{}: r{}", 'r{}: "a"', 30_000)[: 1 << 16]},
    "terminals": {"grammar": chain("R{}: R{}", 'R{}: "a"', 299)},
    "nested terminals": {"grammar": chain('R{}: ("a" | R{} "b")+', 'R{}: "a"', 298)},
    "doubling": {"grammar": chain("R{0}: R{1} R{1}", 'R{}: "a"', 40)},
    "repeated rules": {"grammar": chain("R{}: R{}~9", 'R{}: "a"', 12)},
    "parentheses": {"grammar": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000},
    "gbnf parentheses": {"grammar": "root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000},
    "ambiguous": {"grammar": 'start: start start | "a" | "b" |'},
    "deep schema": {"json": deep(1500)},
    "references": {"json": references(lambda to: {"$ref": to}, 2000)},
    "as many references as may be": {"json": references(
        lambda to: {"anyOf": [{"type": "null"}, {"$ref": to}]}, 290)},
    "nested references": {"json": references(
        lambda to: {"type": "object", "properties": {"x": {"$ref": to}}}, 290)},
    "doubling references": {"json": references(
        lambda to: {"allOf": [{"$ref": to}, {"minLength": 1}]}, 290)},
    "properties": {"json": {"properties": {f"p{i}": {} for i in range(3000)}}},
    "optional properties": {"json": {"properties": {f"p{i}": {} for i in range(200)}}},
    "enum": {"json": {"enum": [f"v{i}" for i in range(9000)]}},
    "multiple": {"json": {"type": "integer", "multipleOf": 99_999_999}},
    "multiples": {"json": {"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}},
    "inline multiple": {"grammar": 'start: %json {"type": "integer", "multipleOf": 99999999}'},
    "pattern": {"json": {"type": "string", "pattern": "a{100000000}"}},
    "repeats": {"regex": "(a{1000}){1000}"},
    "exponential": {"regex": "(a|b)*a(a|b){30}"},
    "exponential too": {"regex": ".*a.{25}"},
    "letters": {"regex": r"\p{L}{1,500}"},
    "many choices": {"choice": [f"choice v{i}" for i in range(9999)]},
    "long": {"json": {"type": "string", "minLength": 10**9}},
    "many items": {"json": {"type": "array", "minItems": 10**6, "items": {"type": "string"}}},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused_or_followed_in_time(grammars: Grammars, name: str) -> None:
    start = time.process_time()
    worst = 0.0
    try:
        constraint = grammars.constraint(StructuredOutputs(**HOSTILE[name]))
    except UsageError as exc:
        assert "structured_outputs." in str(exc)
    else:
        random = np.random.default_rng(0)
        for _ in range(100):
            bits = np.unpackbits(constraint.mask.view(np.uint8), bitorder="little")
            before = time.process_time()
            if constraint.advance(int(random.choice(np.flatnonzero(bits)))):
                break
            worst = max(worst, time.process_time() - before)
    assert time.process_time() - start < 15  # seconds of CPU; a busy machine is no excuse for more
    assert worst < 0.5


def test_a_grammar_that_outgrows_its_limits_ends_its_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sinterlm.engine.constraints._STEP_MAX_ITEMS", 200)
    ambiguous = StructuredOutputs(grammar='start: start start | "a" | "b" |')
    with load(chat_assets()) as llm:
        lost, kept = llm.generate(
            [PROMPT, PROMPT],
            [params(ambiguous, ignore_eos=True), params(StructuredOutputs(regex="[ab]{9}"))],
        )
    assert lost.outputs[0].finish_reason == "error"
    assert "cannot be followed further" in str(lost.outputs[0].stop_reason)
    assert lost.outputs[0].text and set(lost.outputs[0].text) <= {"a", "b"}
    assert kept.outputs[0].finish_reason == "stop" and len(kept.outputs[0].text) == 9


def test_grammars_are_kept_and_compiled_by_one_at_a_time(grammars: Grammars) -> None:
    wanted = [StructuredOutputs(regex=f"a{{{i}}}") for i in range(1, 41)]
    threads = [threading.Thread(target=grammars.prepare, args=(w,)) for w in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(grammars._kept) == 32
    assert grammars._compiled(wanted[-1]) is grammars._compiled(wanted[-1])


def test_what_is_kept_does_not_wait_for_what_is_being_compiled(grammars: Grammars) -> None:
    known = StructuredOutputs(regex="known")
    grammars.prepare(known)
    with grammars._compiling:
        assert grammars.constraint(known).mask.any()
