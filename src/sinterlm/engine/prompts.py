"""What callers may hand to ``LLM.generate``, made uniform: a Prompt each, with its parameters.

Refuses anything else by type; nothing is coerced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypedDict

from sinterlm.engine.sampling import SamplingParams
from sinterlm.engine.tokenizer import Tokenizer
from sinterlm.errors import PromptError, UsageError


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


class _TokensPromptBase(TypedDict):
    prompt_token_ids: Iterable[int]


class TokensPrompt(_TokensPromptBase, total=False):
    """A prompt as token ids; ``prompt`` is only repeated in the output."""

    prompt: str


PromptInput: TypeAlias = str | TextPrompt | TokensPrompt


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, tokenised."""

    token_ids: Iterable[int]
    text: str | None


def parse_prompts(
    prompts: PromptInput | Sequence[PromptInput], tokenizer: Tokenizer
) -> list[Prompt]:
    """Every prompt tokenised. Raises PromptError, naming which one of a list is wrong."""
    if isinstance(prompts, str | Mapping):
        return [parse_prompt(prompts, tokenizer)]
    if not isinstance(prompts, list | tuple):
        raise PromptError(f"prompts must be a prompt or a list, not {type(prompts).__name__}")
    parsed = []
    for i, prompt in enumerate(prompts):
        try:
            parsed.append(parse_prompt(prompt, tokenizer))
        except PromptError as exc:
            raise PromptError(f"prompts[{i}]: {exc}") from exc
    return parsed


def parse_prompt(prompt: PromptInput, tokenizer: Tokenizer) -> Prompt:
    """One prompt tokenised. Raises PromptError; UsageError for text without a tokenizer."""
    if isinstance(prompt, str):
        return _from_text(prompt, tokenizer)
    if not isinstance(prompt, Mapping):
        raise PromptError(
            f"a prompt must be a text or {{'prompt_token_ids': [...]}}, not {type(prompt).__name__}"
        )
    unknown = set(prompt) - {"prompt", "prompt_token_ids"}
    if unknown or not prompt:
        raise PromptError(
            f"a prompt has the keys 'prompt' or 'prompt_token_ids', not {sorted(map(str, prompt))}"
        )
    text = prompt.get("prompt")
    if text is not None and not isinstance(text, str):
        raise PromptError(f"'prompt' must be a text, not {type(text).__name__}")
    token_ids = prompt.get("prompt_token_ids")
    if token_ids is None:
        return _from_text(text or "", tokenizer)
    if isinstance(token_ids, str | Mapping) or not isinstance(token_ids, Iterable):
        raise PromptError("'prompt_token_ids' must be a list of token ids")
    return Prompt(token_ids, text)


def _from_text(text: str, tokenizer: Tokenizer) -> Prompt:
    if not text:
        raise PromptError("the prompt is empty; give at least one character")
    return Prompt(tokenizer.encode(text), text)


def parse_params(
    params: SamplingParams | Sequence[SamplingParams] | None,
    count: int,
    default: SamplingParams,
) -> list[SamplingParams]:
    """One SamplingParams per prompt. Raises UsageError for a list of another length."""
    if params is None:
        return [default] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, list | tuple) or not all(
        isinstance(item, SamplingParams) for item in params
    ):
        raise UsageError("sampling_params must be a SamplingParams or a list of them")
    if len(params) != count:
        raise UsageError(f"{len(params)} sampling_params were given for {count} prompts")
    return list(params)
