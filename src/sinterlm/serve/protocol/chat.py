"""``POST /v1/chat/completions``: the request and its answers, in OpenAI's and vLLM's shape."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

from sinterlm.serve.protocol.answers import PromptLogprobs, Usage
from sinterlm.serve.protocol.fields import accepted, effect, refused
from sinterlm.serve.protocol.shared import GenerationRequest, Strict

Role = Literal["system", "developer", "user", "assistant", "tool"]


class FunctionCall(Strict, kw_only=True):
    """What the model asked for: ``arguments`` is JSON text."""

    name: str
    arguments: str


class ToolCall(Strict, kw_only=True):
    """One call of a tool in a message of the assistant."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None  #: clients that replay a stream's deltas send it


class Message(Strict, kw_only=True):
    """One message. ``content`` may be a list of text parts; other parts are refused by type."""

    role: Role
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None  #: what an earlier answer gave as ``reasoning``
    reasoning_content: str | None = None  #: the same, as older clients call it
    refusal: str | None = None  #: clients replay these four nulls of an answer
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None


class Function(Strict, kw_only=True):
    """A function the model may call; ``parameters`` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict, kw_only=True):
    """A tool; there are only functions."""

    type: Literal["function"] = "function"
    function: Function


class NamedFunction(Strict, kw_only=True):
    """The name in a named ``tool_choice``."""

    name: str


class NamedToolChoice(Strict, kw_only=True):
    """The one tool that must be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


# How a conversation becomes a prompt; shared with /tokenize.
AddGenerationPrompt: TypeAlias = Annotated[
    bool | None, effect("end the prompt where the assistant's answer begins: true")
]
ContinueFinalMessage: TypeAlias = Annotated[
    bool | None, effect("the answer goes on with the last message; not with a new one")
]
ChatTemplate: TypeAlias = Annotated[
    str | None, effect("a template instead of the model's; if the server was told to allow it")
]
ChatTemplateKwargs: TypeAlias = Annotated[
    dict[str, Any] | None, effect("variables for the template, such as enable_thinking")
]


class ChatRequest(GenerationRequest, kw_only=True):
    """A conversation to answer. ``messages`` is the only field that must be there."""

    messages: Annotated[list[Message], effect("the conversation")]
    max_completion_tokens: Annotated[
        int | None, effect("most tokens to generate: as many as the context has room for")
    ] = None
    max_tokens: Annotated[
        int | None, effect("older name of max_completion_tokens, which goes first")
    ] = None
    logprobs: Annotated[bool | None, effect("log-probability of each token")] = None
    top_logprobs: Annotated[
        int | None, effect("that many alternatives per token; needs logprobs")
    ] = None
    tools: Annotated[list[Tool] | None, effect("functions the model may call")] = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedToolChoice | None,
        effect("auto with tools, else none; required and a named one constrain the answer"),
    ] = None
    parallel_tool_calls: Annotated[bool | None, effect("false = at most one call in an answer")] = (
        None
    )
    reasoning_effort: Annotated[
        Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None,
        effect("given to a template that knows it; none also as enable_thinking=false"),
    ] = None
    include_reasoning: Annotated[
        bool | None, effect("false = leave the reasoning out of the answer")
    ] = None
    add_generation_prompt: AddGenerationPrompt = None
    continue_final_message: ContinueFinalMessage = None
    chat_template: ChatTemplate = None
    chat_template_kwargs: ChatTemplateKwargs = None
    documents: Annotated[
        list[dict[str, Any]] | None, effect("given to a template that knows documents")
    ] = None

    prediction: Annotated[
        Any, accepted("a hint that may save time; it never changes the answer")
    ] = None

    echo: Annotated[
        bool | None, refused("put the last message in front of the answer yourself", False)
    ] = None
    functions: Annotated[Any, refused("it was replaced by tools")] = None
    function_call: Annotated[Any, refused("it was replaced by tool_choice", "none")] = None
    modalities: Annotated[Any, refused("the answer is text", ["text"])] = None
    audio: Annotated[Any, refused("the answer is text")] = None
    verbosity: Annotated[Any, refused("ask for it in a message", "medium")] = None
    web_search_options: Annotated[Any, refused("the server has no access to the web")] = None
    mm_processor_kwargs: Annotated[Any, refused("messages are text", {})] = None
    media_io_kwargs: Annotated[Any, refused("messages are text", {})] = None
    mm_payload: Annotated[Any, refused("messages are text", "tensors")] = None
    return_mm_kwargs: Annotated[Any, refused("messages are text")] = None
    return_prompt_text: Annotated[bool | None, refused("use /tokenize and /detokenize", False)] = (
        None
    )


class ChatTopLogprob(msgspec.Struct):
    """One alternative."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(msgspec.Struct):
    """One drawn token."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(msgspec.Struct):
    """One entry per drawn token."""

    content: list[ChatTokenLogprob]


class AnsweredFunction(msgspec.Struct, kw_only=True):
    """A call, or in a stream a piece of one: the name comes first, then arguments in pieces."""

    name: str | UnsetType = UNSET
    arguments: str = ""


class AnsweredToolCall(msgspec.Struct, kw_only=True):
    """A call, or in a stream a piece of the one with that index."""

    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: AnsweredFunction


class AnsweredMessage(msgspec.Struct, kw_only=True):
    """The assistant's message, or in a stream what one token adds to it."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[AnsweredToolCall] | UnsetType = UNSET


FinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(msgspec.Struct, kw_only=True):
    """One answer."""

    index: int
    message: AnsweredMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatAnswer(msgspec.Struct, kw_only=True):
    """All answers."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatEventChoice(msgspec.Struct, kw_only=True):
    """What one token adds to one answer."""

    index: int
    delta: AnsweredMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatEvent(msgspec.Struct, kw_only=True):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatEventChoice]
    usage: Usage | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
