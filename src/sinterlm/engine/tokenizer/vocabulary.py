"""Tokenizer: text <-> token ids, and conversations to prompts, from a bundle's ``TextAssets``.

Never shortens a prompt, and never adds a second beginning-of-sequence token to a chat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tokenizers

from sinterlm.artifact.text import TextAssets
from sinterlm.engine.tokenizer.chat_template import ChatTemplate
from sinterlm.engine.tokenizer.messages import checked_messages
from sinterlm.errors import CheckpointError, PromptError, UsageError

#: How many times shorter a normaliser (Unicode composition, prefixes) makes a text at most.
_NORMAL_SHRINKS = 4


class Tokenizer:
    """Encodes, decodes and renders. Thread-safe once constructed.

    Works without a tokenizer.json for callers that bring token ids: ``has_vocabulary`` is then
    False and ``encode`` raises UsageError. Raises CheckpointError for a damaged tokenizer.json.
    """

    def __init__(self, assets: TextAssets) -> None:
        self.assets = assets
        self._tokenizer = _load_tokenizer(assets.tokenizer_json)
        self._template: ChatTemplate | None = None  # compiled on first use
        #: Texts of single tokens, without and with special ones: streams ask for them all the time.
        self._token_texts: tuple[dict[int, str], dict[int, str]] = ({}, {})

    @property
    def has_vocabulary(self) -> bool:
        """Whether text can be encoded and decoded."""
        return self._tokenizer is not None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Any of these ends generation, unless ignored."""
        return self.assets.eos_token_ids

    @property
    def base_vocab_size(self) -> int:
        """Tokens of the vocabulary without those added to it. Raises UsageError without one."""
        size: int = self._require_tokenizer().get_vocab_size(with_added_tokens=False)
        return size

    @property
    def special_token_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that have a role: bos, eos, unk, pad and their like."""
        tokenizer = self._require_tokenizer()
        found = (tokenizer.token_to_id(text) for text in self.assets.special_tokens.values())
        return tuple(sorted({token_id for token_id in found if token_id is not None}))

    def most_chars(self, num_tokens: int) -> int | None:
        """Characters that ``num_tokens`` tokens can hold at most; None where nothing bounds them.

        So that a text which is far too long is refused without tokenising all of it.
        """
        tokenizer = self._require_tokenizer()
        model = tokenizer.model
        if getattr(model, "unk_token", None) and not getattr(model, "byte_fallback", False):
            return None  # any run of unknown characters may be one token
        longest = max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=1)
        return num_tokens * longest * (1 if tokenizer.normalizer is None else _NORMAL_SHRINKS)

    @property
    def num_special_tokens(self) -> int:
        """Tokens that the post-processor adds to a text."""
        count: int = self._require_tokenizer().num_special_tokens_to_add(False)
        return count

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens written out in it become their ids, as usual.

        With ``add_special_tokens`` the beginning-of-sequence token is added as the checkpoint says:
        by ``add_bos_token`` where that is set, else by tokenizer.json's post-processor. Raises
        PromptError for text that is no Unicode, UsageError without a vocabulary.
        """
        tokenizer = self._require_tokenizer()
        add_bos = self.assets.add_bos_token if add_special_tokens else None
        try:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
            if add_bos is None:
                return ids
            plain: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        except (UnicodeError, TypeError, ValueError) as exc:
            raise PromptError(
                f"the prompt cannot be tokenised: {_why_not_text(text, exc)}"
            ) from exc
        return _with_bos(ids, plain, self.assets.bos_token_id, add_bos)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids beyond the vocabulary (padding of the head) decode to nothing."""
        return self.decode_function(skip_special_tokens=skip_special_tokens)(token_ids)

    def decode_function(self, *, skip_special_tokens: bool) -> Callable[[Sequence[int]], str]:
        """``decode`` with its flag bound."""
        tokenizer = self._require_tokenizer()
        known = self._token_texts[not skip_special_tokens]

        def decode(ids: Sequence[int]) -> str:
            if len(ids) == 1:
                text = known.get(ids[0])
                if text is None:
                    text = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
                    known[ids[0]] = text
                return text
            several: str = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
            return several

        return decode

    def token_text(self, token_id: int) -> str | None:
        """Text of a single token, special ones included; None without a vocabulary."""
        if self._tokenizer is None:
            return None
        text = self._token_texts[True].get(token_id)
        return self.decode([token_id], skip_special_tokens=False) if text is None else text

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt text of a conversation. Encode it with ``add_special_tokens=False``: the
        template writes the beginning-of-sequence token itself where the model wants one.

        ``continue_final_message`` ends the text with the last message's content, left open. Raises
        UsageError when there is no template, it refuses the messages, or it breaks a limit.
        """
        if not isinstance(chat_template_kwargs, Mapping | None):
            raise UsageError(f"chat_template_kwargs={chat_template_kwargs!r} must be an object")
        if tools is not None and not _are_objects(tools):
            raise UsageError("tools must be a list of objects")
        extra = dict(chat_template_kwargs or {})
        reserved = {"messages", "tools", "add_generation_prompt"} & set(extra)
        if reserved:
            raise UsageError(f"chat_template_kwargs may not set {', '.join(sorted(reserved))}")
        if continue_final_message and add_generation_prompt:
            raise UsageError("continue_final_message=True needs add_generation_prompt=False")
        checked = checked_messages(messages)
        variables = {
            **self.assets.special_tokens,
            **extra,
            "messages": checked,
            "tools": None if tools is None else [dict(tool) for tool in tools],
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._compiled(chat_template).render(variables)
        return _left_open(text, checked[-1]["content"]) if continue_final_message else text

    def _compiled(self, chat_template: str | None) -> ChatTemplate:
        if chat_template is not None:
            return ChatTemplate(chat_template)
        if self._template is None:
            if self.assets.chat_template is None:
                raise UsageError(
                    "this model has no chat template; use a plain prompt, or in Python pass "
                    "chat_template="
                )
            self._template = ChatTemplate(self.assets.chat_template)
        return self._template

    def _require_tokenizer(self) -> tokenizers.Tokenizer:
        if self._tokenizer is None:
            raise UsageError(
                "this model has no tokenizer.json, so it neither reads nor writes text; "
                'pass {"prompt_token_ids": [...]} and read .token_ids'
            )
        return self._tokenizer


def _load_tokenizer(source: str | None) -> tokenizers.Tokenizer | None:
    if source is None:
        return None
    try:
        tokenizer = tokenizers.Tokenizer.from_str(source)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as exc:  # a panic of the Rust side is not an Exception
        raise CheckpointError(
            f"tokenizer.json cannot be read ({str(exc)[:200]}); fetch the checkpoint again"
        ) from exc
    # Limits stored by whoever trained the model; a prompt is never shortened behind one's back.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _why_not_text(text: object, exc: Exception) -> str:
    """What is wrong with ``text``: mostly a byte that was no UTF-8 when it was read."""
    try:
        str(text).encode()
    except UnicodeEncodeError as bad:
        return f"character {bad.start} is no Unicode character; give valid UTF-8"
    return str(exc)


def _left_open(text: str, content: str | None) -> str:
    """``text`` up to the end of ``content``, its last message; templates may strip a content."""
    words = (content or "").strip()
    start = text.rfind(words) if words else -1
    if start < 0:
        raise UsageError(
            "continue_final_message=True needs a last message with text that the template shows"
        )
    whole = (content or "").lstrip()
    return text[:start] + (whole if text.startswith(whole, start) else words)


def _are_objects(items: object) -> bool:
    return isinstance(items, list | tuple) and all(isinstance(item, Mapping) for item in items)


def _with_bos(ids: list[int], plain: list[int], bos: int | None, add: bool) -> list[int]:
    """``ids`` beginning with bos if ``add``, else without the bos that was added to ``plain``."""
    if bos is None:
        return ids
    if add:
        return ids if ids[:1] == [bos] else [bos, *ids]
    was_added = ids[:1] == [bos] and ids[1 : 1 + len(plain)] == plain
    return ids[1:] if was_added else ids
