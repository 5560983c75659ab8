"""text.json: everything about text that travels with a model. Written by the frontend (from
``tokenizer.json`` & co. or a GGUF header), read by ``engine.tokenizer``. Standard library only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from sinterlm.errors import BundleError


@dataclass(frozen=True)
class TextAssets:
    """Tokenizer, chat template and generation defaults of one checkpoint."""

    tokenizer_json: str | None = None  #: contents of a Hugging Face tokenizer.json
    chat_template: str | None = None  #: jinja2 source
    special_tokens: dict[str, str] = field(default_factory=dict)  #: bos_token, eos_token, … -> text
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()  #: any of them ends generation (unless ignore_eos)
    add_bos_token: bool | None = None  #: None = as tokenizer.json's post-processor does
    generation: dict[str, Any] = field(default_factory=dict)  #: generation_config.json's contents

    def to_json(self) -> str:
        """One JSON object, one key per field."""
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> TextAssets:
        """Inverse of ``to_json``. Raises BundleError on anything else."""
        try:
            data = json.loads(text)
            known = {f.name for f in fields(cls)}
            if not isinstance(data, dict) or set(data) != known:
                raise ValueError("unexpected keys")
            data["eos_token_ids"] = tuple(int(i) for i in data["eos_token_ids"])
            return cls(**data)
        except (ValueError, TypeError, RecursionError) as exc:
            raise BundleError(
                f"text.json is damaged ({exc}); run `sinterlm cache verify` to find and rebuild it"
            ) from exc
