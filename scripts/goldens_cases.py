"""The tiny checkpoints of ``tests/goldens/models``: shapes, spellings of config.json, dtypes.

Data only. Each case varies what real checkpoints vary: architecture, grouped heads, head_dim that
is not hidden / heads, biases, rope kinds, config spellings, stored dtype, sharding, odd sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Json = dict[str, object]


@dataclass(frozen=True)
class Case:
    """One checkpoint. ``config`` is merged into config.json as written, spelling included."""

    name: str
    model_type: str  #: llama | qwen2 | qwen3 | mistral
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    layers: int
    stored: str  #: dtype of the tensors: bfloat16 | float16 | float32
    seed: int
    config: Json = field(default_factory=dict)
    generation: Json = field(default_factory=dict)  #: generation_config.json; empty = no file
    tied: bool = False
    shards: int = 1
    tokenizer: bool = False  #: a byte-level BPE of ``vocab`` entries and a chat template
    explicit_head_dim: bool = True
    prompt_lengths: tuple[int, ...] = (1, 19, 40)

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v carry a bias."""
        return self.model_type == "qwen2" or bool(self.config.get("attention_bias"))

    @property
    def o_bias(self) -> bool:
        """Whether o carries a bias."""
        return self.model_type != "qwen2" and bool(self.config.get("attention_bias"))

    @property
    def mlp_bias(self) -> bool:
        """Whether gate, up and down carry a bias."""
        return bool(self.config.get("mlp_bias"))

    @property
    def qk_norm(self) -> bool:
        """Whether each head of q and k is normed (Qwen3)."""
        return self.model_type == "qwen3"


CASES: tuple[Case, ...] = (
    Case(
        "llama-tied-mha", "llama", hidden=48, ffn=100, heads=3, kv_heads=3, head_dim=16,
        vocab=259, layers=2, stored="bfloat16", seed=101, tied=True, tokenizer=True,
        explicit_head_dim=False,
        config={"rope_theta": 10000.0, "torch_dtype": "bfloat16", "eos_token_id": 257},
        generation={"eos_token_id": 257, "bos_token_id": 256},
    ),
    Case(
        "llama-llama3-gqa4", "llama", hidden=72, ffn=52, heads=8, kv_heads=2, head_dim=16,
        vocab=131, layers=2, stored="float16", seed=202, shards=2,
        config={
            "rope_theta": 10000.0, "torch_dtype": "float16",
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            },
        },
    ),
    Case(
        "llama-biases", "llama", hidden=40, ffn=72, heads=2, kv_heads=1, head_dim=32,
        vocab=131, layers=2, stored="bfloat16", seed=303, tied=True,
        config={
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "dtype": "bfloat16", "attention_bias": True, "mlp_bias": True,
        },
    ),
    Case(
        "llama-linear", "llama", hidden=32, ffn=60, heads=2, kv_heads=2, head_dim=16,
        vocab=131, layers=2, stored="float32", seed=404, tied=True, explicit_head_dim=False,
        config={
            "rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0},
            "torch_dtype": "float32",
        },
    ),
    Case(
        "llama-dynamic", "llama", hidden=32, ffn=68, heads=2, kv_heads=1, head_dim=16,
        vocab=131, layers=3, stored="bfloat16", seed=505,
        config={
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
            "dtype": "bfloat16",
        },
    ),
    Case(
        "llama-wide", "llama", hidden=200, ffn=136, heads=2, kv_heads=1, head_dim=32,
        vocab=131, layers=1, stored="bfloat16", seed=607, tied=True, shards=3,
        config={"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "bfloat16"},
    ),
    Case(
        "qwen2-yarn-gqa7", "qwen2", hidden=28, ffn=96, heads=7, kv_heads=1, head_dim=64,
        vocab=131, layers=2, stored="bfloat16", seed=708, tied=True,
        config={
            "rope_theta": 10000.0, "torch_dtype": "bfloat16", "use_sliding_window": False,
            "sliding_window": 8, "max_window_layers": 1,
            "rope_scaling": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
            },
        },
    ),
    Case(
        "qwen2-gqa5", "qwen2", hidden=40, ffn=136, heads=10, kv_heads=2, head_dim=16,
        vocab=259, layers=2, stored="float16", seed=809,
        config={"rope_theta": 1000000.0, "torch_dtype": "float16"},
    ),
    Case(
        "qwen2-mixed-window", "qwen2", hidden=32, ffn=44, heads=4, kv_heads=2, head_dim=48,
        vocab=131, layers=2, stored="float32", seed=909, tied=True, prompt_lengths=(1, 17, 70),
        config={
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "dtype": "float32", "use_sliding_window": True, "sliding_window": 12,
            "max_window_layers": 1,
        },
    ),
    Case(
        "qwen3-qknorm", "qwen3", hidden=32, ffn=100, heads=2, kv_heads=1, head_dim=128,
        vocab=259, layers=2, stored="bfloat16", seed=1011, tied=True, tokenizer=True,
        config={
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "dtype": "bfloat16", "attention_bias": False, "eos_token_id": 257,
        },
        generation={"eos_token_id": [257, 258], "temperature": 0.6, "top_p": 0.95, "top_k": 20},
    ),
    Case(
        "mistral-window", "mistral", hidden=40, ffn=68, heads=2, kv_heads=1, head_dim=80,
        vocab=131, layers=2, stored="bfloat16", seed=1111, prompt_lengths=(1, 23, 80),
        config={"rope_theta": 10000.0, "sliding_window": 24, "torch_dtype": "bfloat16"},
    ),
    Case(
        "mistral-vocab1000", "mistral", hidden=32, ffn=300, heads=2, kv_heads=1, head_dim=32,
        vocab=1000, layers=2, stored="bfloat16", seed=1212, tied=True, tokenizer=True,
        prompt_lengths=(2, 17),
        config={
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "sliding_window": None, "dtype": "bfloat16", "eos_token_id": 998,
        },
    ),
)  # fmt: skip
