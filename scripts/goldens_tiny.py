"""Write the tiny checkpoints of ``goldens_cases`` and what Hugging Face transformers makes of them.

The weights come from NumPy seeds, so they do not depend on the torch version; the expected logits
come from transformers in float32 with eager attention, reading the very folder that is checked in.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

from goldens_cases import Case, Json

GREEDY_TOKENS = 32
MIN_MARGIN = 2e-3  #: a golden must not hang on rounding: the smallest top-2 gap allowed, in logits
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<{{ message['role'] }}>{{ message['content'] }}</{{ message['role'] }}>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def _dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def config_json(case: Case) -> Json:
    """The config.json of a case, in the spelling the case asks for."""
    config: Json = {
        "architectures": [ARCHITECTURES[case.model_type]],
        "model_type": case.model_type,
        "vocab_size": case.vocab,
        "hidden_size": case.hidden,
        "intermediate_size": case.ffn,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5 if case.model_type in ("llama", "mistral") else 1e-6,
        "tie_word_embeddings": case.tied,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if case.explicit_head_dim:
        config["head_dim"] = case.head_dim
    config.update(case.config)
    return config


def weights(case: Case) -> dict[str, NDArray[np.float32]]:
    """Seeded float32 weights by Hugging Face name, large enough that logits are well apart.

    The final norm's weight has random signs: without them a tied model repeats its last token.
    """
    rng = np.random.Generator(np.random.PCG64(case.seed))

    def matrix(out: int, inner: int, gain: float) -> NDArray[np.float32]:
        values = rng.standard_normal((out, inner)) * (gain / math.sqrt(inner))
        return values.astype(np.float32)

    def bias(size: int) -> NDArray[np.float32]:
        return (rng.standard_normal(size) * 0.3).astype(np.float32)

    def norm(size: int) -> NDArray[np.float32]:
        return (1.0 + 0.2 * rng.standard_normal(size)).astype(np.float32)

    q, kv = case.heads * case.head_dim, case.kv_heads * case.head_dim
    out = {"model.embed_tokens.weight": matrix(case.vocab, case.hidden, 3.5)}
    for i in range(case.layers):
        at = f"model.layers.{i}."
        for name, rows, inner, gain, has_bias in (
            ("self_attn.q_proj", q, case.hidden, 1.6, case.qkv_bias),
            ("self_attn.k_proj", kv, case.hidden, 1.6, case.qkv_bias),
            ("self_attn.v_proj", kv, case.hidden, 1.2, case.qkv_bias),
            ("self_attn.o_proj", case.hidden, q, 1.5, case.o_bias),
            ("mlp.gate_proj", case.ffn, case.hidden, 1.5, case.mlp_bias),
            ("mlp.up_proj", case.ffn, case.hidden, 1.5, case.mlp_bias),
            ("mlp.down_proj", case.hidden, case.ffn, 1.5, case.mlp_bias),
        ):
            out[f"{at}{name}.weight"] = matrix(rows, inner, gain)
            if has_bias:
                out[f"{at}{name}.bias"] = bias(rows)
        if case.qk_norm:
            out[at + "self_attn.q_norm.weight"] = norm(case.head_dim)
            out[at + "self_attn.k_norm.weight"] = norm(case.head_dim)
        out[at + "input_layernorm.weight"] = norm(case.hidden)
        out[at + "post_attention_layernorm.weight"] = norm(case.hidden)
    sign = np.where(rng.random(case.hidden) < 0.5, -1.0, 1.0)
    out["model.norm.weight"] = (norm(case.hidden) * sign).astype(np.float32)
    if not case.tied:
        out["lm_head.weight"] = matrix(case.vocab, case.hidden, 3.5)
    return out


def _save_weights(case: Case, folder: Path) -> None:
    stored = getattr(torch, case.stored)
    tensors = {k: torch.from_numpy(v).to(stored) for k, v in weights(case).items()}
    if case.shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    per_shard = -(-len(names) // case.shards)
    weight_map: dict[str, str] = {}
    for i in range(case.shards):
        file = f"model-{i + 1:05d}-of-{case.shards:05d}.safetensors"
        part = names[i * per_shard : (i + 1) * per_shard]
        save_file({k: tensors[k] for k in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    _dump(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )


def _save_tokenizer(case: Case, folder: Path, text: str) -> None:
    """A byte-level BPE with exactly ``case.vocab`` ids, the last three of them special."""
    base = case.vocab - 3
    trainer = trainers.BpeTrainer(
        vocab_size=base,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_special_tokens(["<|start|>", "<|end|>", "<|pad|>"])
    if tokenizer.get_vocab_size() != case.vocab:
        raise SystemExit(f"{case.name}: tokenizer has {tokenizer.get_vocab_size()} ids")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: Json = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|start|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
    }
    if case.model_type == "qwen3":  # the newer place of a chat template
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    else:
        settings["chat_template"] = CHAT_TEMPLATE
    _dump(folder / "tokenizer_config.json", settings)


def write_checkpoint(case: Case, folder: Path, text: str) -> None:
    """Write the checkpoint folder of a case, replacing what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    _dump(folder / "config.json", config_json(case))
    if case.generation:
        _dump(folder / "generation_config.json", case.generation)
    _save_weights(case, folder)
    if case.tokenizer:
        _save_tokenizer(case, folder, text)


def _greedy(model: torch.nn.Module, prompt: NDArray[np.int32]) -> tuple[list[int], list[float]]:
    """Tokens and top-2 gaps, each step a full pass: no cache, so no question of its meaning."""
    ids = prompt.tolist()
    gaps: list[float] = []
    for _ in range(GREEDY_TOKENS):
        top = model(torch.tensor([ids])).logits[0, -1].topk(2)
        gaps.append(float(top.values[0] - top.values[1]))
        ids.append(int(top.indices[0]))
    return ids[len(prompt) :], gaps


def check_features_matter(
    case: Case, folder: Path, logits: torch.Tensor, ids: torch.Tensor
) -> None:
    """Refuse a golden that could not notice an ignored rope scaling or sliding window."""
    plain = AutoConfig.from_pretrained(folder)
    rope = dict(plain.rope_parameters)
    variants: list[Json] = []
    if rope["rope_type"] not in ("default", "dynamic"):  # dynamic is default in short contexts
        variants.append(
            {"rope_parameters": {"rope_type": "default", "rope_theta": rope["rope_theta"]}}
        )
    if getattr(plain, "sliding_window", None):
        full = ["full_attention"] * case.layers
        variants.append({"sliding_window": None, "layer_types": full})
    for change in variants:
        config = AutoConfig.from_pretrained(folder, **change)
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            moved = float((model(ids[None]).logits[0] - logits).abs().max())
        if moved < 0.5:
            raise SystemExit(f"{case.name}: {change} moves the logits by {moved} only")


def expected(case: Case, folder: Path) -> dict[str, NDArray[Any]]:
    """What transformers computes from the folder: the arrays of expected.npz.

    ``prompt_i`` int32 [n], ``logits_i`` float32 [n, vocab], ``greedy_i`` int32 [32], ``margin_i``
    float32 [32] (best minus second best logit at each greedy step).
    """
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise SystemExit(f"{case.name}: transformers reports {kind} {info[kind]}")
    model.eval()
    rng = np.random.Generator(np.random.PCG64(case.seed + 7))
    out: dict[str, NDArray[Any]] = {}
    for i, length in enumerate(case.prompt_lengths):
        prompt = rng.integers(0, case.vocab, length).astype(np.int32)
        with torch.no_grad():
            logits = model(torch.from_numpy(prompt.astype(np.int64))[None]).logits[0]
            greedy, gaps = _greedy(model, prompt)
        if i == len(case.prompt_lengths) - 1:
            check_features_matter(case, folder, logits, torch.from_numpy(prompt.astype(np.int64)))
        if min(gaps) < MIN_MARGIN:
            raise SystemExit(
                f"{case.name}: prompt {i} has a margin of {min(gaps)}: change the seed"
            )
        if len(set(greedy)) < 6:
            raise SystemExit(f"{case.name}: prompt {i} only says {sorted(set(greedy))}")
        out[f"prompt_{i}"] = prompt
        out[f"logits_{i}"] = logits.numpy()
        out[f"greedy_{i}"] = np.array(greedy, np.int32)
        out[f"margin_{i}"] = np.array(gaps, np.float32)
    return out


def make(case: Case, root: Path, text: str) -> str:
    """Write one case below ``root`` and return a line about it."""
    folder = root / case.name
    write_checkpoint(case, folder, text)
    arrays = expected(case, folder)
    np.savez(folder / "expected.npz", allow_pickle=False, **arrays)
    size = sum(os.path.getsize(f) for f in folder.iterdir())
    margins = np.concatenate([v for k, v in arrays.items() if k.startswith("margin")])
    distinct = [len(set(v.tolist())) for k, v in arrays.items() if k.startswith("greedy")]
    spread = max(float(v.std()) for k, v in arrays.items() if k.startswith("logits"))
    return (
        f"{case.name:20s} {size / 1000:6.0f} KB  logits std {spread:4.1f}  margin min "
        f"{margins.min():.4f} median {np.median(margins):.2f}  distinct greedy {distinct}"
    )
