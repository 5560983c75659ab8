"""Fields that both generating endpoints have, and the objects inside them.

What a value may be is judged once, by ``SamplingParams``; here is only its JSON type.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from sinterlm.serve.protocol.fields import accepted, effect, refused

_TEXT_ONLY = "SinterLM serves text models"


class Strict(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An object of a request: a key nobody reads is an error."""


class StreamOptions(Strict, kw_only=True):
    """What a stream carries besides text."""

    include_usage: bool | None = None  #: a last event with the usage and no choices
    continuous_usage_stats: bool | None = None  #: the usage so far in every event
    include_obfuscation: bool | None = None  #: accepted: padding against traffic analysis


class JsonSchemaFormat(Strict, kw_only=True):
    """``response_format.json_schema``."""

    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None  #: an answer always follows the schema


class ResponseFormat(Strict, kw_only=True):
    """The form of the answer's text."""

    type: str
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputsFields(Strict, kw_only=True):
    """vLLM's ``structured_outputs``: exactly one constraint on the text."""

    json: str | dict[str, Any] | bool | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: Any = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None


class GenerationRequest(Strict, kw_only=True):
    """What ``/v1/completions`` and ``/v1/chat/completions`` have in common."""

    model: Annotated[
        str | None, effect("name of the served model; another one is a 404; absent = ours")
    ] = None
    stream: Annotated[bool | None, effect("answer as server-sent events, one token each")] = None
    stream_options: Annotated[
        StreamOptions | None,
        effect("include_usage: a last event with the usage; continuous_usage_stats: in each"),
    ] = None

    n: Annotated[int | None, effect("completions per prompt")] = None
    temperature: Annotated[float | None, effect("0 = greedy; absent = the model's default")] = None
    top_p: Annotated[float | None, effect("draw from the smallest set of this probability")] = None
    top_k: Annotated[int | None, effect("draw from the k most likely; 0 or -1 = all")] = None
    min_p: Annotated[
        float | None, effect("drop tokens below this share of the likeliest's probability")
    ] = None
    seed: Annotated[int | None, effect("the same seed draws the same tokens")] = None
    presence_penalty: Annotated[
        float | None, effect("subtracted from the logit of tokens already in the answer")
    ] = None
    frequency_penalty: Annotated[float | None, effect("the same, times how often they occur")] = (
        None
    )
    repetition_penalty: Annotated[
        float | None, effect("above 1 discourages tokens already in prompt or answer")
    ] = None
    logit_bias: Annotated[
        dict[str, float] | None, effect("token id -> [-100, 100] added to its logit")
    ] = None

    bad_words: Annotated[
        list[str] | None, effect("never complete any of these texts, at a word's beginning")
    ] = None
    allowed_token_ids: Annotated[
        list[int] | None, effect("draw none but these tokens; name an end token to let it end")
    ] = None

    stop: Annotated[str | list[str] | None, effect("end before any of these texts")] = None
    stop_token_ids: Annotated[list[int] | None, effect("end at any of these tokens")] = None
    include_stop_str_in_output: Annotated[
        bool | None, effect("keep what ended the answer in its text")
    ] = None
    ignore_eos: Annotated[bool | None, effect("go on after the end-of-sequence token")] = None
    min_tokens: Annotated[int | None, effect("no end before this many tokens")] = None
    skip_special_tokens: Annotated[
        bool | None, effect("false = show special tokens in the text")
    ] = None
    prompt_logprobs: Annotated[
        int | None, effect("log-probabilities of the prompt's tokens, with this many others")
    ] = None
    add_special_tokens: Annotated[
        bool | None,
        effect("add a beginning-of-sequence token to a text prompt; chat: to the template's text"),
    ] = None
    truncate_prompt_tokens: Annotated[
        int | None, effect("keep this many tokens of the prompt; -1 = what leaves room to answer")
    ] = None
    truncation_side: Annotated[
        Literal["left", "right"] | None, effect("which side truncate_prompt_tokens cuts off: left")
    ] = None

    response_format: Annotated[
        ResponseFormat | None, effect("text, json_object, or json_schema with its schema")
    ] = None
    structured_outputs: Annotated[
        StructuredOutputsFields | None,
        effect("one of json, json_object, regex, choice, grammar constrains the text"),
    ] = None
    guided_json: Annotated[
        str | dict[str, Any] | bool | None, effect("older spelling of structured_outputs.json")
    ] = None
    guided_whitespace_pattern: Annotated[
        str | None, effect("regex of the whitespace that guided_json may have")
    ] = None
    guided_regex: Annotated[str | None, effect("older spelling of structured_outputs.regex")] = None
    guided_choice: Annotated[
        list[str] | None, effect("older spelling of structured_outputs.choice")
    ] = None
    guided_grammar: Annotated[
        str | None, effect("older spelling of structured_outputs.grammar")
    ] = None

    priority: Annotated[int | None, effect("lower runs earlier")] = None
    cache_salt: Annotated[
        str | None, effect("prompts share cached prefixes only with the same salt")
    ] = None
    request_id: Annotated[
        str | None, effect("becomes part of the answer's id; the header x-request-id goes first")
    ] = None
    return_token_ids: Annotated[
        bool | None, effect("token ids of prompt and answer beside the text")
    ] = None
    return_tokens_as_token_ids: Annotated[
        bool | None, effect("logprobs name tokens as token_id:N")
    ] = None

    user: Annotated[str | None, accepted("names the end user; nobody is told apart")] = None
    metadata: Annotated[
        dict[str, Any] | None, accepted("labels of stored answers; nothing is stored")
    ] = None
    store: Annotated[bool | None, refused("answers are never stored", False)] = None
    service_tier: Annotated[
        str | None, accepted("a hint about the queue; there is one queue, ordered by priority")
    ] = None
    safety_identifier: Annotated[
        str | None, accepted("names the end user; nobody is told apart")
    ] = None
    prompt_cache_key: Annotated[
        str | None, accepted("a routing hint; prefixes are found by content; see cache_salt")
    ] = None
    prompt_cache_retention: Annotated[
        str | None, accepted("a hint how long to cache; pages are kept while there is room")
    ] = None
    session_id: Annotated[str | None, accepted("a routing hint; prefixes are found by content")] = (
        None
    )
    guided_decoding_backend: Annotated[
        str | None, accepted("which library constrains; the constraint is the same")
    ] = None

    use_beam_search: Annotated[
        bool | None, refused("there is no beam search; use n and logprobs", False)
    ] = None
    length_penalty: Annotated[float | None, refused("it belongs to beam search", 1.0)] = None
    spaces_between_special_tokens: Annotated[
        bool | None, refused("text is what the tokenizer decodes", True)
    ] = None
    logprob_token_ids: Annotated[Any, refused("use logprobs for the most likely tokens")] = None
    thinking_token_budget: Annotated[
        Any, refused("use max_tokens, or chat_template_kwargs to switch thinking off")
    ] = None
    repetition_detection: Annotated[Any, refused("use a penalty, stop or max_tokens")] = None
    stream_interval: Annotated[int | None, refused("every event holds one token", 1)] = None
    watermarking: Annotated[bool | None, refused("there is no watermark", False)] = None
    kv_transfer_params: Annotated[Any, refused("there is one process and one cache")] = None
    ec_transfer_params: Annotated[Any, refused(_TEXT_ONLY)] = None
    vllm_xargs: Annotated[Any, refused("there are no extensions")] = None
    routed_experts_prompt_start: Annotated[
        Any, refused("there is no report of routed experts", 0)
    ] = None
    return_token_offsets: Annotated[
        bool | None, refused("use /tokenize with return_token_strs", False)
    ] = None
