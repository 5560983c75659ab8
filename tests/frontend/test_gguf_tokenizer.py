"""Tokenizers made of GGUF metadata, run by the real tokenizers library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from sinterlm.artifact.text import TextAssets
from sinterlm.errors import CheckpointError, UnsupportedModelError
from sinterlm.frontend.gguf_tokenizer import read_gguf_text

PATH = Path("m.gguf")


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte, in byte order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    table = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}
    return [table[b] for b in range(256)]


def gpt2_metadata(pre: str | None = "smollm", **keys: Any) -> dict[str, Any]:
    tokens = ["<|end|>", "<|start|>", *byte_alphabet(), "he", "ll", "hell", "12", "<think>"]
    data = {
        "model": "gpt2",
        "tokens": tokens,
        "token_type": [3, 3] + [1] * (len(tokens) - 3) + [4],
        "merges": ["h e", "l l", "he ll", "1 2"],
        "bos_token_id": 1,
        "eos_token_id": 0,
    }
    if pre is not None:
        data["pre"] = pre
    return {f"tokenizer.ggml.{k}": v for k, v in (data | keys).items() if v is not None}


def load(assets: TextAssets) -> Tokenizer:
    assert assets.tokenizer_json is not None
    return Tokenizer.from_str(assets.tokenizer_json)


def pieces(text: str, **keys: Any) -> list[str]:
    return load(read_gguf_text(PATH, gpt2_metadata(**keys), "llama")).encode(text).tokens


def test_byte_level_bpe() -> None:
    tokenizer = load(read_gguf_text(PATH, gpt2_metadata(), "llama"))
    encoded = tokenizer.encode("hello<|end|>é\n<think>")
    assert encoded.tokens == ["hell", "o", "<|end|>", "Ã", "©", "Ċ", "<think>"]
    assert encoded.ids[2] == 0
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == "hello<|end|>é\n<think>"
    assert tokenizer.decode(encoded.ids) == "helloé\n<think>"  # user-defined is not special


@pytest.mark.parametrize(
    ("pre", "digits"),
    [
        ("smollm", ["1", "2", "3"]),
        ("gpt-2", ["12", "3"]),
        ("default", ["12", "3"]),
        ("llama-bpe", ["12", "3"]),
        ("qwen2", ["1", "2", "3"]),
        ("deepseek-r1-qwen", ["1", "2", "3"]),
        ("tekken", ["1", "2", "3"]),
    ],
)
def test_pre_tokenizers_split_digits_as_their_models_do(pre: str, digits: list[str]) -> None:
    assert pieces("123", pre=pre, add_bos_token=False) == digits


def test_llama3_takes_whole_words_before_merges() -> None:
    tokens = [*gpt2_metadata()["tokenizer.ggml.tokens"], "xyz"]
    changed = {"tokens": tokens, "token_type": [1] * len(tokens), "add_bos_token": False}
    assert pieces("xyz", pre="llama-bpe", **changed) == ["xyz"]
    assert pieces("xyz", pre="qwen2", **changed) == ["x", "y", "z"]


def test_qwen2_normalises_to_nfc() -> None:
    decomposed = "e\u0301"
    assert pieces(decomposed, pre="qwen2") == pieces("é", pre="qwen2")
    assert pieces(decomposed, pre="deepseek-r1-qwen") != pieces("é", pre="deepseek-r1-qwen")


def test_bos_is_added_when_the_file_or_its_kind_says_so() -> None:
    assert pieces("he", pre="smollm") == ["he"]
    assert pieces("he", pre="smollm", add_bos_token=True) == ["<|start|>", "he"]
    assert pieces("he", pre="llama-bpe") == ["<|start|>", "he"]
    assert pieces("he", pre="llama-bpe", add_bos_token=False) == ["he"]
    assets = read_gguf_text(PATH, gpt2_metadata("llama-bpe", bos_token_id=None), "llama")
    assert assets.add_bos_token is False and assets.bos_token_id is None


def test_ids_and_names_of_special_tokens() -> None:
    metadata = gpt2_metadata(eot_token_id=1, eom_token_id=0, padding_token_id=0)
    metadata["tokenizer.chat_template"] = "{{ messages }}"
    assets = read_gguf_text(PATH, metadata, "llama")
    assert assets.special_tokens == {
        "bos_token": "<|start|>", "eos_token": "<|end|>", "pad_token": "<|end|>",
    }  # fmt: skip
    assert assets.eos_token_ids == (0, 1)
    assert assets.chat_template == "{{ messages }}"
    assert TextAssets.from_json(assets.to_json()) == assets


def test_a_file_without_a_tokenizer() -> None:
    assert read_gguf_text(PATH, {}, "llama") == TextAssets()


@pytest.mark.parametrize(
    ("pre", "keys", "words"),
    [
        ("chatglm-bpe", {}, ("chatglm-bpe", "llama-bpe")),
        (None, {}, ("pre",)),
        ("smollm", {"model": "t5"}, ("t5", "gpt2")),
        ("smollm", {"model": 3}, ("model",)),
        ("smollm", {"tokens": []}, ("tokens",)),
        ("smollm", {"tokens": [1, 2]}, ("tokens",)),
        ("smollm", {"tokens": ["a", "a"], "token_type": None}, ("'a'", "twice")),
        ("smollm", {"token_type": [1]}, ("token_type",)),
        ("smollm", {"merges": None}, ("merges",)),
        ("smollm", {"merges": ["h zz"]}, ("h zz",)),
        ("smollm", {"merges": ["he"]}, ("'he'",)),
        ("smollm", {"merges": ["h h"]}, ("h h",)),
        ("smollm", {"eos_token_id": 99999}, ("eos_token_id", "99999")),
        ("smollm", {"eot_token_id": -1}, ("eot_token_id",)),
        ("smollm", {"add_bos_token": 1}, ("add_bos_token",)),
    ],
)
def test_bad_tokenizers(pre: str | None, keys: dict[str, Any], words: tuple[str, ...]) -> None:
    metadata = gpt2_metadata(pre) | {f"tokenizer.ggml.{k}": v for k, v in keys.items()}
    with pytest.raises(CheckpointError) as caught:
        read_gguf_text(PATH, {k: v for k, v in metadata.items() if v is not None}, "llama")
    for word in (*words, "m.gguf"):
        assert word in str(caught.value)


def test_qwen_files_without_pre_use_qwens() -> None:
    data = read_gguf_text(PATH, gpt2_metadata(None), "qwen2").tokenizer_json
    assert data is not None and json.loads(data)["normalizer"] == {"type": "NFC"}
    with pytest.raises(UnsupportedModelError):
        read_gguf_text(PATH, gpt2_metadata(None), "llama")


# ---------------------------------------------------------------------------------- SentencePiece


def sentencepiece_metadata(**keys: Any) -> dict[str, Any]:
    pieces = ["▁", "h", "e", "l", "o", "he", "ll", "hell", "▁hell", "▁hello", "lo"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    scores = [0.0] * 259 + [-10.0 - i for i in range(5)] + [-1.0, -2.0, -3.0, -4.0, -5.0, -1.5]
    data = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
    }
    return {f"tokenizer.ggml.{k}": v for k, v in (data | keys).items() if v is not None}


def test_sentencepiece_bpe() -> None:
    tokenizer = load(read_gguf_text(PATH, sentencepiece_metadata(), "llama"))
    # scores: he (-1), then lo (-1.5) before ll (-2), so "hello" is he + l + lo
    assert tokenizer.encode("hello").tokens == ["<s>", "▁", "he", "l", "lo"]
    encoded = tokenizer.encode("he</s>é")
    assert encoded.tokens == ["<s>", "▁", "he", "</s>", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("hello é").ids) == "hello é"


def test_sentencepiece_options() -> None:
    metadata = sentencepiece_metadata(add_space_prefix=False, add_bos_token=False)
    assets = read_gguf_text(PATH, metadata, "llama")
    assert load(assets).encode("he").tokens == ["he"]
    assert load(assets).decode(load(assets).encode(" he").ids) == " he"
    assert assets.special_tokens["unk_token"] == "<unk>"
    assert assets.eos_token_ids == (2,) and assets.bos_token_id == 1


def test_sentencepiece_merges_given_by_the_file() -> None:
    metadata = sentencepiece_metadata(merges=["l l"], scores=None)
    tokens = load(read_gguf_text(PATH, metadata, "llama")).encode("hello").tokens
    assert tokens == ["<s>", "▁", "h", "e", "ll", "o"]


@pytest.mark.parametrize("scores", [None, [1.0], "x", [float("nan")] * 270])
def test_sentencepiece_needs_scores(scores: Any) -> None:
    with pytest.raises(CheckpointError, match="scores"):
        read_gguf_text(PATH, sentencepiece_metadata(scores=scores), "llama")
