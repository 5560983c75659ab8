"""Small tokenizers built on the spot, and the assets of a small chat model."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from sinterlm.artifact.text import TextAssets

BOS, EOS, IM_START = "<|bos|>", "<|eos|>", "<|im_start|>"

TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


@cache
def byte_level_json(post_bos: bool = False) -> str:
    """256 bytes and a few merges: every character beyond ASCII spans several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("ð", "Ł")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (BOS, EOS, IM_START)])
    if post_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    tokenizer.enable_truncation(max_length=8)  # a leftover of training that must not bite
    return str(tokenizer.to_str())


@cache
def sentencepiece_json() -> str:
    """Metaspace with byte fallback, as Llama 2 has it: decoding drops a leading space."""
    vocab = {"<unk>": 0} | {f"<0x{i:02X}>": i + 1 for i in range(256)}
    for piece in ("▁", "h", "i", "o"):
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return str(tokenizer.to_str())


def token_id(token: str) -> int:
    """Id of a special token of the byte-level tokenizer."""
    for added in json.loads(byte_level_json())["added_tokens"]:
        if added["content"] == token:
            return int(added["id"])
    raise KeyError(token)


def vocab_size() -> int:
    """Tokens of the byte-level tokenizer, special ones included."""
    return token_id(IM_START) + 1


def chat_assets(
    *,
    post_bos: bool = False,
    add_bos_token: bool | None = None,
    chat_template: str | None = TEMPLATE,
    generation: dict[str, object] | None = None,
) -> TextAssets:
    """Everything text needs."""
    return TextAssets(
        tokenizer_json=byte_level_json(post_bos),
        chat_template=chat_template,
        special_tokens={"bos_token": BOS, "eos_token": EOS},
        bos_token_id=token_id(BOS),
        eos_token_ids=(token_id(EOS),),
        add_bos_token=add_bos_token,
        generation=generation or {},
    )
