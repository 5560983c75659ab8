"""The server's OpenAPI document, narrowed to requests that are mostly answered.

The document declares types. What else a value must be, and which fields exclude each other, a
server says with a 400; drawn from types alone, hardly a request would reach the engine.
"""

from __future__ import annotations

import copy
from typing import Any

_PENALTY = {"type": "number", "minimum": -2, "maximum": 2}
# Integers are listed: a schema's integer may be written 2.0, which the server refuses.
_FEW = {"enum": list(range(21))}
_LENGTH = {"enum": list(range(2, 9))}
_INT64 = {"enum": [-(2**63), -7, 0, 1, 12345, 2**63 - 1]}
_TOKEN = {"enum": [0, 1, 2, 28, 199, 253, 1000, 30000, 49151]}
_TEXT = {"type": "string", "minLength": 1, "maxLength": 12}
_SCHEMA = {"$ref": "#/components/schemas/AnySchema"}
_FLAG = {"type": "boolean"}

#: Of a JSON schema: enough keywords to make any automaton, right or wrong.
_ANY_SCHEMA: dict[str, Any] = {
    "type": "object", "additionalProperties": False, "maxProperties": 4,
    "properties": {
        "type": {"enum": ["object", "array", "string", "number", "integer", "boolean", "null"]},
        "properties": {"type": "object", "additionalProperties": _SCHEMA, "maxProperties": 3},
        "required": {"type": "array", "items": _TEXT, "maxItems": 3},
        "additionalProperties": _FLAG, "items": _SCHEMA,
        "anyOf": {"type": "array", "items": _SCHEMA, "minItems": 1, "maxItems": 3},
        "enum": {"type": "array", "items": {"type": ["string", "number", "null"]}, "minItems": 1},
        "const": {"type": ["string", "number", "boolean", "null"]}, "pattern": _TEXT,
        "minLength": _FEW, "maxLength": _FEW, "minItems": _FEW, "maxItems": _FEW,
        "minimum": {"type": "number"}, "maximum": {"type": "number"},
    },
}  # fmt: skip

#: Fields of both kinds of request that may stand beside any other.
_BOTH: dict[str, Any] = {
    "model": {"const": "smollm2"}, "stream": _FLAG, "n": {"enum": [1, 2, 3]}, "seed": _INT64,
    "temperature": {"type": "number", "minimum": 0, "maximum": 1e30},
    "top_p": {"type": "number", "minimum": 1e-30, "maximum": 1},
    "top_k": {"enum": [-1, 0, 1, 5, 50000, 2**31 - 1]},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "presence_penalty": _PENALTY, "frequency_penalty": _PENALTY,
    "repetition_penalty": {"type": "number", "minimum": 1e-30, "maximum": 1e30},
    "logit_bias": {"type": "object", "propertyNames": {"pattern": "^[1-9][0-9]{0,3}$"},
                   "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
    "stop": {"type": "array", "items": _TEXT, "maxItems": 4},
    "stop_token_ids": {"type": "array", "items": _TOKEN},
    "include_stop_str_in_output": _FLAG, "ignore_eos": _FLAG, "skip_special_tokens": _FLAG,
    "min_tokens": {"enum": [0, 1, 2]}, "max_tokens": _LENGTH, "return_token_ids": _FLAG,
    "return_tokens_as_token_ids": _FLAG, "priority": _INT64,
    "cache_salt": _TEXT, "user": {"type": "string"},
    "truncate_prompt_tokens": {"enum": [1, 2, 16]}, "add_special_tokens": _FLAG,
}  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "CompletionRequest": {
        "prompt": {"anyOf": [
            {"type": "string", "minLength": 1, "maxLength": 30},
            {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": 3},
            {"type": "array", "items": _TOKEN,
             "minItems": 1, "maxItems": 16},
        ]},
        "logprobs": _FEW,
    },
    "ChatRequest": {
        "messages": {"type": "array", "minItems": 1, "maxItems": 2, "items": {
            "type": "object", "required": ["role", "content"], "additionalProperties": False,
            "properties": {"role": {"enum": ["user", "system", "assistant"]}, "content": _TEXT},
        }},
        "logprobs": {"const": True}, "top_logprobs": _FEW,
    },
}  # fmt: skip

#: What constrains an answer; a request has one of them.
FORMS: dict[str, dict[str, Any]] = {
    "tokens": {"bad_words": {"type": "array", "items": _TEXT, "maxItems": 3},
               "allowed_token_ids": {"enum": [None, list(range(1000)), [28]]}},
    "json": {"structured_outputs": {
        "type": "object", "required": ["json"], "properties": {"json": _SCHEMA},
        "additionalProperties": False}},
    "regex": {"guided_regex": _TEXT},
    "choice": {"guided_choice": {"type": "array", "items": _TEXT, "minItems": 1}},
    "grammar": {"guided_grammar": {"type": "string", "pattern": '^root ::= "[a-z]+"( \\| "b")*$'}},
}  # fmt: skip


def narrowed(document: dict[str, Any], form: str) -> dict[str, Any]:
    """``document`` with the generating operations alone, for requests that have ``form``."""
    made = copy.deepcopy(document)
    generating = ("/v1/completions", "/v1/chat/completions")
    made["paths"] = {path: made["paths"][path] for path in generating}
    schemas = made["components"]["schemas"]
    schemas["AnySchema"] = _ANY_SCHEMA
    for kind, own in _OWN.items():
        known = schemas[kind]["properties"]
        properties = {**_BOTH, **own, **FORMS[form]}
        assert properties.keys() <= known.keys(), "a field that the server no longer has"
        schemas[kind]["properties"] = properties
        required = {"max_tokens", *schemas[kind]["required"], *FORMS[form]}
        if kind == "ChatRequest":
            required.add("logprobs")
        schemas[kind]["required"] = sorted(required)
    return made
