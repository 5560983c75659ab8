"""Log-probabilities of the engine in the shapes of the two endpoints."""

from __future__ import annotations

from collections.abc import Sequence

from sinterlm.engine.outputs import Logprob, TokenLogprobs
from sinterlm.serve.protocol.answers import PromptLogprob, PromptLogprobs
from sinterlm.serve.protocol.chat import ChatLogprobs, ChatTokenLogprob, ChatTopLogprob
from sinterlm.serve.protocol.completion import CompletionLogprobs


def chat_logprobs(tokens: Sequence[TokenLogprobs], num_top: int, *, as_ids: bool) -> ChatLogprobs:
    """One entry per drawn token, with its ``num_top`` most likely alternatives, likeliest first."""
    return ChatLogprobs([_chat_token(token, num_top, as_ids) for token in tokens])


def _chat_token(token: TokenLogprobs, num_top: int, as_ids: bool) -> ChatTokenLogprob:
    drawn_id, drawn = next(iter(token.items()))
    best = sorted(token.items(), key=lambda item: item[1].rank)
    top = []
    for token_id, entry in best:
        if entry.rank <= num_top:
            name = _name(token_id, entry, as_ids)
            top.append(ChatTopLogprob(name, entry.logprob, _bytes(entry)))
    return ChatTokenLogprob(_name(drawn_id, drawn, as_ids), drawn.logprob, _bytes(drawn), top)


def completion_logprobs(
    tokens: Sequence[TokenLogprobs | None],
    token_ids: Sequence[int],
    texts: Sequence[str | None],
    *,
    offset: int,
    as_ids: bool,
) -> CompletionLogprobs:
    """Parallel lists over ``token_ids``; None, at the start of a prompt, has no log-probability.

    ``offset`` is where the first token begins in the answer's text, in characters.
    """
    out = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for token, token_id, text in zip(tokens, token_ids, texts, strict=True):
        name = f"token_id:{token_id}" if as_ids or text is None else text
        out.tokens.append(name)
        out.text_offset.append(offset)
        offset += len(text or "")
        if token is None:
            out.token_logprobs.append(None)
            out.top_logprobs.append(None)
            continue
        out.token_logprobs.append(token[token_id].logprob)
        top: dict[str, float] = {}
        for other, entry in token.items():  # two tokens may look alike: the likelier one is kept
            shown = _name(other, entry, as_ids)
            top[shown] = max(entry.logprob, top.get(shown, entry.logprob))
        out.top_logprobs.append(top)
    return out


def prompt_logprobs(tokens: Sequence[TokenLogprobs | None]) -> PromptLogprobs:
    """vLLM's ``prompt_logprobs``: token id -> entry, per prompt token."""
    return [
        None
        if token is None
        else {
            str(token_id): PromptLogprob(entry.logprob, entry.rank, entry.decoded_token)
            for token_id, entry in token.items()
        }
        for token in tokens
    ]


def _name(token_id: int, entry: Logprob, as_ids: bool) -> str:
    text = entry.decoded_token
    return f"token_id:{token_id}" if as_ids or text is None else text


def _bytes(entry: Logprob) -> list[int] | None:
    """UTF-8 of the token; None where it holds only part of a character, which text cannot say."""
    text = entry.decoded_token
    return None if text is None or "\ufffd" in text else list(text.encode())
