"""ServedModel: what the protocol knows of the model behind it, apart from running it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from sinterlm.engine.llm import LLM
from sinterlm.engine.sampling import SamplingParams
from sinterlm.engine.tokenizer import Tokenizer
from sinterlm.serve.errors import ApiError
from sinterlm.serve.parsers import CLOSING, OPENING


@dataclass(frozen=True)
class ServedModel:
    """One model under its names. Everything here may be used from the event loop's thread."""

    names: tuple[str, ...]  #: any of these in ``model``; the first one is told to clients
    root: str  #: MODEL as the server was started with
    created: int  #: seconds since the epoch
    max_model_len: int  #: tokens of prompt and answer together
    vocab_size: int
    tokenizer: Tokenizer
    defaults: SamplingParams  #: for what a request leaves open
    default_max_tokens: int | None  #: of the checkpoint; None = as many as there is room for
    chat_template: str | None = None  #: instead of the checkpoint's own
    tool_parser: str | None = None  #: name in ``serve.parsers``; None = tool calls stay text
    reasoning_parser: str | None = None  #: name in ``serve.parsers``; None = no reasoning field
    #: ``<think>`` and ``</think>``, where each is one token: a constraint waits for the answer.
    think_tokens: tuple[int, int] | None = None
    #: A text of more characters has more tokens than ``max_model_len``; None = not known.
    most_chars: int | None = None

    @property
    def name(self) -> str:
        """The name told to clients."""
        return self.names[0]

    def check_name(self, asked: str | None) -> None:
        """Raise a 404 when a client wants another model."""
        if asked is not None and asked not in self.names:
            raise ApiError(
                404,
                f"model={asked[:100]!r} is not served here; served: {', '.join(self.names)}",
                kind="not_found_error",
                param="model",
                code="model_not_found",
            )

    def echoed(self, text: str | None, token_ids: Iterable[int]) -> str:
        """A prompt as text: as it was given, or what its token ids read as."""
        if text is not None or not self.tokenizer.has_vocabulary:
            return text or ""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def count_tokens(self, text: str) -> int:
        """Tokens of a piece of an answer."""
        return len(self.tokenizer.encode(text, add_special_tokens=False)) if text else 0

    @property
    def template_source(self) -> str:
        """The chat template in use; empty without one."""
        return self.chat_template or self.tokenizer.assets.chat_template or ""


def think_tokens(tokenizer: Tokenizer) -> tuple[int, int] | None:
    """The tokens of ``<think>`` and ``</think>``; None where a tag is several."""
    if not tokenizer.has_vocabulary:
        return None
    tags = [tokenizer.encode(tag, add_special_tokens=False) for tag in (OPENING, CLOSING)]
    return (tags[0][0], tags[1][0]) if all(len(ids) == 1 for ids in tags) else None


def served_model(
    llm: LLM,
    *,
    names: tuple[str, ...],
    root: str,
    chat_template: str | None,
    tool_parser: str | None,
    reasoning_parser: str | None,
) -> ServedModel:
    """Describe a loaded model for the protocol."""
    generation = llm.tokenizer.assets.generation
    defaults = llm.get_default_sampling_params()
    return ServedModel(
        names=names,
        root=root,
        created=int(time.time()),
        max_model_len=llm.max_model_len,
        vocab_size=llm.bundle.manifest.shape.vocab_size,
        tokenizer=llm.tokenizer,
        defaults=defaults,
        default_max_tokens=defaults.max_tokens if generation.get("max_new_tokens") else None,
        chat_template=chat_template,
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
        think_tokens=think_tokens(llm.tokenizer),
        most_chars=(
            llm.tokenizer.most_chars(llm.max_model_len) if llm.tokenizer.has_vocabulary else None
        ),
    )
