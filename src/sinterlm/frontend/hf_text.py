"""Text assets of a Hugging Face directory: tokenizer, chat template, special tokens, defaults.

Every file is optional except that what is there must be readable; what is missing stays None, for
whoever needs it to report.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sinterlm.artifact.text import TextAssets
from sinterlm.errors import CheckpointError
from sinterlm.frontend.fields import MAX_INT, Fields, parse_json, read_json, read_text, show

_SPECIAL_TOKENS = (
    "bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token",
)  # fmt: skip


def read_text_assets(directory: Path, config: dict[str, Any]) -> TextAssets:
    """Text assets of ``directory``; ``config`` is the contents of its ``config.json``.

    Ends of generation are those of ``generation_config.json`` (else ``config.json``) and the
    tokenizer's own eos token. Raises CheckpointError.
    """
    settings = _optional_json(directory / "tokenizer_config.json")
    generation = _optional_json(directory / "generation_config.json")
    tokenizer_path = directory / "tokenizer.json"
    tokenizer_json = read_text(tokenizer_path) if os.path.lexists(tokenizer_path) else None
    fields = Fields(settings, str(directory / "tokenizer_config.json"))
    special = _special_tokens(_optional_json(directory / "special_tokens_map.json"))
    special |= _special_tokens(settings)
    ids = _token_ids(tokenizer_json, tokenizer_path, set(special.values()))
    config_fields = Fields(config, str(directory / "config.json"))
    generation_fields = Fields(generation, str(directory / "generation_config.json"))
    eos = _id_list(generation_fields, "eos_token_id")
    eos = eos or _id_list(config_fields, "eos_token_id")
    eos += tuple(i for i in _known(ids, special, "eos_token") if i not in eos)
    bos = (
        _id_list(generation_fields, "bos_token_id")
        or _id_list(config_fields, "bos_token_id")
        or _known(ids, special, "bos_token")
    )
    add_bos = None
    if not fields.absent("add_bos_token"):
        add_bos = fields.boolean("add_bos_token", False)
    return TextAssets(
        tokenizer_json=tokenizer_json,
        chat_template=_chat_template(directory, fields),
        special_tokens=special,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=eos,
        add_bos_token=add_bos,
        generation=generation,
    )


def _optional_json(path: Path) -> dict[str, Any]:
    # A link that leads nowhere is a download cut short, never a file that was left out.
    return read_json(path) if os.path.lexists(path) else {}


def _chat_template(directory: Path, fields: Fields) -> str | None:
    """``chat_template.jinja`` wins; in the config a string, or a list of {name, template} of which
    the one called "default" is meant."""
    path = directory / "chat_template.jinja"
    if os.path.lexists(path):
        return read_text(path)
    value = fields.data.get("chat_template")
    if isinstance(value, list):
        named = {}
        for entry in value:
            if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
                raise fields.error("chat_template", entry, "an object with name and template")
            named[entry["name"]] = entry.get("template")
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise fields.error("chat_template", value, "a string or a list of templates")
    return value


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """Special tokens by role; each is a string, or an object with ``content``."""
    tokens = {}
    for role in _SPECIAL_TOKENS:
        value = settings.get(role)
        if isinstance(value, dict):
            value = value.get("content")
        if value is None:
            continue
        if not isinstance(value, str):
            raise CheckpointError(f"tokenizer_config.json: {role} is {show(value)}, expected text")
        tokens[role] = value
    return tokens


def _id_list(fields: Fields, key: str) -> tuple[int, ...]:
    """A token id or a list of them; empty when absent or null."""
    value = fields.data.get(key)
    values = [] if value is None else value if isinstance(value, list) else [value]
    for item in values:
        # -1 is how some configs write "none"
        if type(item) is not int or not -1 <= item <= MAX_INT:
            raise fields.error(key, value, "a token id or a list of token ids")
    return tuple(dict.fromkeys(item for item in values if item >= 0))


def _token_ids(text: str | None, path: Path, wanted: set[str]) -> dict[str, int]:
    """Ids of the wanted tokens among the added tokens and the vocabulary of a tokenizer.json."""
    if text is None:
        return {}
    data = parse_json(text, str(path))
    found: dict[str, int] = {}
    model = data.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        found = {token: vocab[token] for token in wanted if type(vocab.get(token)) is int}
    added = data.get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        if not isinstance(entry, dict) or type(entry.get("id")) is not int:
            raise CheckpointError(f"{path}: added token {show(entry)} has no integer id")
        if entry.get("content") in wanted:
            found[entry["content"]] = entry["id"]
    return found


def _known(ids: dict[str, int], special: dict[str, str], role: str) -> tuple[int, ...]:
    token = special.get(role)
    return (ids[token],) if token in ids else ()
