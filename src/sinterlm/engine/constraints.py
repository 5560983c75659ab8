"""Constraints: StructuredOutputs compiled for a tokenizer, and the tokens each still allows.

The one importer of llguidance. Whatever is wrong with a schema, regex or grammar is found when it
is compiled, in bounded time and memory; one that outgrows its limits later ends its own request.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from sinterlm.engine.grammar_limits import check_grammar, check_regex, check_schema
from sinterlm.engine.structured import Reasoning, StructuredOutputs
from sinterlm.engine.tokenizer import Tokenizer
from sinterlm.errors import UsageError
from sinterlm.runtime.batch import UInt32, token_mask

if TYPE_CHECKING:  # imported where it is first needed: most runs follow no grammar
    import llguidance

T = TypeVar("T")

#: Compiled grammars kept; a hostile one may hold some tens of MB.
_MAX_KEPT = 32
#: Bytes of stack to compile on: the library recurses along chains of rules.
_STACK_BYTES = 64 << 20
#: Tighter than the library's own where a single step could otherwise take most of a second.
_MAX_ITEMS_IN_ROW, _STEP_MAX_ITEMS, _STEP_LEXER_FUEL = 1000, 4000, 50_000
_INITIAL_LEXER_FUEL = 400_000
_MAX_LEXER_STATES, _MAX_GRAMMAR_SIZE = 20_000, 50_000  # 1-2 KB each; symbols
_REGEX_SYNTAX = re.compile(r"[\\.+*?()|\[\]{}^$]")


class Constraint:
    """What one sequence may draw next.

    ``mask`` is the bit mask [ceil(V / 32)] uint32 of abi.h, rewritten in place by ``advance``.
    ``failure`` says why it could not be followed further, once that has happened.
    While the model reasons it may draw anything but ``eos``: an answer always follows.
    """

    __slots__ = ("_dropped", "_eos", "_is_inside", "_kept", "_matcher", "_reasoning", "failure",
                 "mask")  # fmt: skip

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        *,
        eos: UInt32,
        ignore_eos: bool,
        kept: UInt32 | None,
        reasoning: Reasoning | None,
    ) -> None:
        self._matcher = matcher
        self._eos = eos
        self._dropped = eos if ignore_eos else None  # taken out wherever others remain
        self._kept = kept  # the only tokens that may be drawn, if not all
        self._reasoning = reasoning  # None once it is over
        self._is_inside = False
        self.mask = np.zeros_like(eos)
        self.failure: str | None = None
        if reasoning is not None and reasoning.opening is None:
            self._reason()
            return
        self._fill()
        if reasoning is not None and reasoning.opening is not None:
            opening = token_mask((reasoning.opening,), 32 * len(eos))
            self.mask |= opening if kept is None else opening & kept

    def advance(self, token_id: int) -> bool:
        """Follow a drawn token. True when nothing can come after it: the text is complete, or the
        grammar has become too complex to follow, which ``failure`` then says.
        """
        if self._reasoning is not None:
            if self._is_inside:
                if token_id == self._reasoning.closing:
                    self._reasoning = None
                    self._fill()
                return self.failure is not None
            if token_id == self._reasoning.opening:
                self._reason()
                return False
            self._reasoning = None
        self._matcher.consume_token(token_id)
        if self._matcher.is_stopped():  # after a failure too
            self._look_for_failure()
            return True
        self._fill()
        if self.failure is not None and self._may_end():
            self.failure = None  # the text is complete, and none of the kept tokens goes on
            return True
        return self.failure is not None

    def _reason(self) -> None:
        self._is_inside = True
        np.invert(self._eos, out=self.mask)
        if self._kept is not None:
            self.mask &= self._kept

    def _may_end(self) -> bool:
        """Whether the text is complete as it is."""
        return not self._matcher.is_error() and bool(self._matcher.is_accepting())

    def allows_beside(self, token_ids: Iterable[int]) -> bool:
        """Whether anything may be drawn that is none of ``token_ids``."""
        return bool((self.mask & ~token_mask(token_ids, 32 * len(self.mask))).any())

    def _fill(self) -> None:
        self._matcher.unsafe_compute_mask_ptr(self.mask.ctypes.data, self.mask.nbytes)
        self._look_for_failure()
        if self._kept is not None:
            self.mask &= self._kept
            if not self.mask.any() and self.failure is None:
                self.failure = "allowed_token_ids has no token that the grammar allows here"
        if self._dropped is not None:
            others = self.mask & ~self._dropped
            if others.any():
                self.mask[:] = others

    def _look_for_failure(self) -> None:
        if self._matcher.is_error():
            self.failure = f"the grammar cannot be followed further: {_message(self._matcher)}"


class Grammars:
    """Compiles for one tokenizer and a head of ``vocab_size`` rows; keeps the last few results.

    Thread-safe. The vocabulary is converted on first use, which takes a second for a large one.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._assets = tokenizer.assets
        self._vocab_size = vocab_size
        self._compiling, self._keeping = threading.Lock(), threading.Lock()
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._kept: OrderedDict[StructuredOutputs, llguidance.LLMatcher] = OrderedDict()

    def prepare(self, wanted: StructuredOutputs) -> None:
        """Compile and keep. Raises UsageError saying what is wrong with ``wanted``."""
        self._compiled(wanted)

    def constraint(
        self, wanted: StructuredOutputs, *, ignore_eos: bool = False, kept: UInt32 | None = None
    ) -> Constraint:
        """A new sequence's constraint, at its beginning. Raises UsageError as ``prepare`` does.

        With ``ignore_eos`` the text goes on for as long as its grammar lets it. ``kept`` is a mask
        of the only tokens that may be drawn.
        """
        made = Constraint(
            self._compiled(wanted).deep_copy(),
            eos=token_mask(self._eos, self._vocab_size),
            ignore_eos=ignore_eos,
            kept=kept,
            reasoning=wanted.reasoning,
        )
        if made.failure is not None:
            raise UsageError(made.failure)
        return made

    @property
    def _eos(self) -> list[int]:
        return [i for i in self._assets.eos_token_ids if 0 <= i < self._vocab_size]

    def _compiled(self, wanted: StructuredOutputs) -> llguidance.LLMatcher:
        kept = self._recall(wanted)
        if kept is not None:
            return kept
        with self._compiling:  # one at a time: a flood of grammars takes one CPU at most
            matcher = self._recall(wanted)  # whoever was before may have wanted the same
            if matcher is None:
                source = _source(wanted)
                matcher = _on_deep_stack(lambda: self._compile(wanted.kind, source))
                with self._keeping:
                    self._kept[wanted] = matcher
                    if len(self._kept) > _MAX_KEPT:
                        self._kept.popitem(last=False)
            return matcher

    def _recall(self, wanted: StructuredOutputs) -> llguidance.LLMatcher | None:
        """What is kept, without waiting for what is being compiled."""
        with self._keeping:
            if wanted not in self._kept:
                return None
            self._kept.move_to_end(wanted)
            return self._kept[wanted]

    def _compile(self, kind: str, source: str) -> llguidance.LLMatcher:
        import llguidance

        if self._vocabulary is None:
            self._vocabulary = self._convert_vocabulary()
        matcher = llguidance.LLMatcher(
            self._vocabulary,
            source,
            limits=llguidance.LLParserLimits(
                max_items_in_row=_MAX_ITEMS_IN_ROW,
                step_max_items=_STEP_MAX_ITEMS,
                initial_lexer_fuel=_INITIAL_LEXER_FUEL,
                step_lexer_fuel=_STEP_LEXER_FUEL,
                max_lexer_states=_MAX_LEXER_STATES,
                max_grammar_size=_MAX_GRAMMAR_SIZE,
                verbose_errors=False,
            ),
            log_level=0,
        )
        if not matcher.is_error():
            # Some faults show only when the first token is asked for.
            first = matcher.deep_copy()
            first.compute_bitmask()
            if not first.is_error():
                return matcher
            matcher = first
        raise UsageError(f"structured_outputs.{kind} cannot be used: {_message(matcher)}")

    def _convert_vocabulary(self) -> llguidance.LLTokenizer:
        import llguidance

        if self._assets.tokenizer_json is None:
            raise UsageError("structured_outputs needs a tokenizer.json, and this model has none")
        try:
            return llguidance.LLTokenizer(
                self._assets.tokenizer_json, n_vocab=self._vocab_size, eos_token=self._eos or None
            )
        except Exception as exc:
            raise UsageError(
                f"structured_outputs cannot be used with this model's tokenizer: {str(exc)[:200]}"
            ) from exc


def _source(wanted: StructuredOutputs) -> str:
    """llguidance's own form of the constraint. Raises UsageError for what would take too long."""
    from llguidance import LLMatcher

    if wanted.json is not None or wanted.json_object:
        schema = '{"type": "object"}' if wanted.json is None else str(wanted.json)
        check_schema(schema)
        if wanted.whitespace_pattern is not None:
            check_regex("whitespace_pattern", wanted.whitespace_pattern)
        return LLMatcher.grammar_from_json_schema(
            schema,
            overrides={
                "whitespace_flexible": not wanted.disable_any_whitespace,
                "whitespace_pattern": wanted.whitespace_pattern,
            },
        )
    if wanted.regex is not None:
        check_regex("regex", wanted.regex)
        return LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.choice is not None:
        return LLMatcher.grammar_from_regex("|".join(map(_literal, wanted.choice)))
    assert wanted.grammar is not None
    check_grammar(wanted.grammar)
    return LLMatcher.grammar_from_lark(_lark(wanted.grammar))


def _lark(grammar: str) -> str:
    """A grammar as Lark; one in GBNF or EBNF (``root ::= ...``) is rewritten."""
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import any_to_lark  # slow to import, and rarely needed

    try:
        return str(any_to_lark(grammar))
    except (Exception, RecursionError) as exc:
        raise UsageError(
            f"structured_outputs.grammar is neither Lark nor GBNF: {str(exc)[:200]}"
        ) from exc


def _literal(text: str) -> str:
    """A regex that matches ``text`` alone."""
    return _REGEX_SYNTAX.sub(lambda match: "\\" + match.group(), text)


def _message(matcher: llguidance.LLMatcher) -> str:
    """The library's complaint, on one line."""
    message = " ".join(str(matcher.get_error()).replace("<non-verbose/>", "").split())
    if message in ("NoExtension", "NoExtensionBias"):
        return "no text satisfies it"
    if message.startswith("oneOf"):
        return "oneOf is supported only where no two branches can match the same text; use anyOf"
    return message[:300]


def _on_deep_stack(fn: Callable[[], T]) -> T:
    """``fn()`` on a thread whose stack does not depend on who calls."""
    results: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(fn())
        except BaseException as exc:  # handed to whoever waits
            errors.append(exc)

    found = threading.stack_size(_STACK_BYTES)
    try:
        thread = threading.Thread(target=call, name="sinterlm-grammar")
        thread.start()
    finally:
        threading.stack_size(found)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
