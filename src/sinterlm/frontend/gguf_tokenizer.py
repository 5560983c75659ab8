"""A GGUF's tokenizer metadata becomes text assets with a Hugging Face tokenizer.json.

Reads the vocabularies called gpt2 (byte-level BPE) and llama (SentencePiece BPE with scores);
refuses others by name, duplicate tokens, and merges of tokens that do not exist.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinterlm.artifact.text import TextAssets
from sinterlm.errors import CheckpointError, UnsupportedModelError
from sinterlm.frontend.fields import MAX_INT, Fields, show
from sinterlm.frontend.hf_config import MAX_VOCAB
from sinterlm.frontend.pre_tokenizers import pre_tokenizer

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # tokenizer.ggml.token_type
_SPACE = "\u2581"  # how SentencePiece spells a space
#: Longest token, in characters, of which SentencePiece merges are derived (its pieces have 16).
_MAX_PIECE = 256

_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
#: What llama.cpp assumes of a SentencePiece vocabulary that does not say.
_SENTENCEPIECE_IDS = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}


@dataclass(frozen=True)
class _Vocabulary:
    what: str  #: names the file in errors
    tokens: list[str]
    types: list[int]  #: parallel to tokens, or empty
    vocab: dict[str, int]


def read_gguf_text(path: Path, metadata: dict[str, Any], architecture: str) -> TextAssets:
    """Text assets of a GGUF; ``tokenizer_json`` is None when the file has no tokenizer.

    Raises CheckpointError, UnsupportedModelError.
    """
    prefix = "tokenizer.ggml."
    keys = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    fields = Fields(keys, f"{path}: {prefix.rstrip('.')}")
    general = Fields(metadata, str(path))
    template = None
    if not general.absent("tokenizer.chat_template"):
        template = general.text("tokenizer.chat_template")
    if fields.absent("model"):
        return TextAssets(chat_template=template)
    model = fields.text("model")
    if model not in ("gpt2", "llama"):
        raise UnsupportedModelError(
            f"{path}: tokenizer model {show(model)} is not supported; supported: gpt2, llama"
        )
    vocabulary = _vocabulary(fields)
    ids = _role_ids(fields, vocabulary, _SENTENCEPIECE_IDS if model == "llama" else {})
    if model == "gpt2":
        data, add_bos = _byte_level_bpe(fields, vocabulary, architecture)
    else:
        data, add_bos = _sentencepiece_bpe(fields, vocabulary, ids), True
    add_bos = fields.boolean("add_bos_token", add_bos) and "bos_token_id" in ids
    if add_bos:
        data["post_processor"] = _bos_processor(vocabulary.tokens, ids["bos_token_id"])
    special = {role: vocabulary.tokens[ids[key]] for role, key in _ROLES.items() if key in ids}
    return TextAssets(
        tokenizer_json=json.dumps(data, ensure_ascii=False),
        chat_template=template,
        special_tokens=special,
        bos_token_id=ids.get("bos_token_id"),
        eos_token_ids=_eos_ids(fields, vocabulary, ids),
        add_bos_token=add_bos,
    )


def _vocabulary(fields: Fields) -> _Vocabulary:
    tokens = _strings(fields, "tokens")
    if not 1 <= len(tokens) <= MAX_VOCAB:
        raise CheckpointError(f"{fields.what}: {len(tokens)} tokens, expected 1 to {MAX_VOCAB}")
    types = fields.data.get("token_type", [])
    if not isinstance(types, list) or len(types) not in (0, len(tokens)):
        raise fields.error("token_type", types, f"a list of {len(tokens)} numbers")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise CheckpointError(f"{fields.what}: token {show(twice)} appears twice")
    return _Vocabulary(fields.what, tokens, types, vocab)


def _strings(fields: Fields, key: str) -> list[str]:
    value = fields.data.get(key)
    if not isinstance(value, list) or (value and not isinstance(value[0], str)):
        raise fields.error(key, value, "a list of strings")
    return value


def _role_ids(fields: Fields, vocabulary: _Vocabulary, defaults: dict[str, int]) -> dict[str, int]:
    """Ids of bos, eos, unknown and padding tokens that the file, or its kind, has."""
    ids = {}
    for key in _ROLES.values():
        if not fields.absent(key):
            ids[key] = _token_id(fields, key, vocabulary)
        elif defaults.get(key, len(vocabulary.tokens)) < len(vocabulary.tokens):
            ids[key] = defaults[key]
    return ids


def _token_id(fields: Fields, key: str, vocabulary: _Vocabulary) -> int:
    token_id = fields.integer(key, low=0, high=MAX_INT)
    if token_id >= len(vocabulary.tokens):
        raise fields.error(key, token_id, f"below {len(vocabulary.tokens)}, the number of tokens")
    return token_id


def _eos_ids(fields: Fields, vocabulary: _Vocabulary, ids: dict[str, int]) -> tuple[int, ...]:
    """End of sequence, of turn and of message, as the file gives them."""
    found = [ids["eos_token_id"]] if "eos_token_id" in ids else []
    for key in ("eot_token_id", "eom_token_id"):
        if not fields.absent(key):
            found.append(_token_id(fields, key, vocabulary))
    return tuple(dict.fromkeys(found))


def _byte_level_bpe(
    fields: Fields, vocabulary: _Vocabulary, architecture: str
) -> tuple[dict[str, Any], bool]:
    """tokenizer.json of a gpt2 vocabulary, and whether it adds bos when the file does not say."""
    if fields.absent("pre") and architecture == "llama":
        raise UnsupportedModelError(
            f"{fields.what}.pre is missing: how to split text is unknown; supported: files that "
            "name their pre-tokenizer (convert the model again with a current llama.cpp)"
        )
    pre = pre_tokenizer(fields.text("pre", "qwen2"), f"{fields.what}.pre")
    steps: Any = list(pre.steps)
    model = _bpe(vocabulary, _file_merges(fields, vocabulary)) | {
        "ignore_merges": pre.ignore_merges
    }
    data = _tokenizer_json(vocabulary, model) | {
        "normalizer": pre.normalizer,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {
            "type": "Sequence", "pretokenizers": steps
        },
        "decoder": {
            "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True
        },
    }  # fmt: skip
    return data, pre.add_bos


def _sentencepiece_bpe(
    fields: Fields, vocabulary: _Vocabulary, ids: dict[str, int]
) -> dict[str, Any]:
    """tokenizer.json of a llama vocabulary. A space is put before the text and after every special
    token, as SentencePiece models of Llama 2 and Mistral expect, unless the file says otherwise."""
    if fields.absent("merges"):
        merges = _merges_from_scores(fields, vocabulary)
    else:
        merges = _file_merges(fields, vocabulary)
    unknown = ids.get("unknown_token_id")
    model = _bpe(vocabulary, merges) | {
        "unk_token": None if unknown is None else vocabulary.tokens[unknown],
        "fuse_unk": True,
        "byte_fallback": True,
    }
    prefix = fields.boolean("add_space_prefix", True)
    normalizers: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    ]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": _SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _tokenizer_json(vocabulary, model) | {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def _tokenizer_json(vocabulary: _Vocabulary, model: dict[str, Any]) -> dict[str, Any]:
    """The frame of a tokenizer.json: control tokens are special, user-defined ones are not."""
    added = [
        {
            "id": i,
            "content": vocabulary.tokens[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != _USER_DEFINED,
        }
        for i, kind in enumerate(vocabulary.types)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and vocabulary.tokens[i]
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": model,
    }


def _bpe(vocabulary: _Vocabulary, merges: list[tuple[str, str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary.vocab,
        "merges": merges,
    }


def _file_merges(fields: Fields, vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """The file's merges, "left right" each; both and their join must be tokens."""
    merges = []
    for merge in _strings(fields, "merges"):
        # a piece may itself begin with a space, so the search starts behind the first character
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or any(t not in vocabulary.vocab for t in (left, right, left + right)):
            raise CheckpointError(f"{fields.what}: merge {show(merge)} is not of known tokens")
        merges.append((left, right))
    return merges


def _merges_from_scores(fields: Fields, vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Merges that a SentencePiece vocabulary implies: every way to cut a token into two tokens,
    best score first."""
    scores = fields.data.get("scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary.tokens):
        raise fields.error("scores", scores, f"a list of {len(vocabulary.tokens)} numbers")
    vocab, found = vocabulary.vocab, []
    for i, token in enumerate(vocabulary.tokens):
        kind = vocabulary.types[i] if vocabulary.types else 1
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) or len(token) > _MAX_PIECE:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                found.append((-scores[i], vocab[left], vocab[right], left, right))
    if any(score != score for score, *_ in found):
        raise fields.error("scores", float("nan"), "numbers")
    found.sort()
    return [(left, right) for *_, left, right in found]


def _bos_processor(tokens: list[str], bos_id: int) -> dict[str, Any]:
    """A post-processor that puts the bos token before the text."""
    bos = tokens[bos_id]
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    sequences = [{"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [first, sequences[0]],
        "pair": [first, sequences[0], {"SpecialToken": {"id": bos, "type_id": 1}}, sequences[1]],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
