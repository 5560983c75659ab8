"""One parametric decoder: DecoderConfig becomes a Graph of plain ops over Hugging Face tensors.

Also checks a checkpoint against the graph: every tensor the graph names must be there in the right
shape, and every weight that is there must be one the graph names. Nothing is silently ignored.
"""

from __future__ import annotations

import difflib
from dataclasses import replace

from sinterlm.errors import CheckpointError, UnsupportedModelError
from sinterlm.frontend.checkpoint import Checkpoint
from sinterlm.ir.graph import DecoderConfig, Graph, Value, Weight
from sinterlm.ir.ops import (
    Add,
    Attention,
    Embed,
    KvAppend,
    LmHead,
    MatMul,
    Op,
    QkNorm,
    RmsNorm,
    RotaryEmbedding,
    Sample,
    SiluMul,
)

EMBED = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"


def build_graph(
    config: DecoderConfig, dtype: str, kv_in_codes: bool = False, num_ranks: int = 1
) -> Graph:
    """Graph of plain ops for one step of T tokens and R sampled rows.

    ``dtype`` ("bf16" | "fp32") is that of GEMM operands and, unless ``kv_in_codes``, of KV; the
    residual stream, sums and logits are fp32. Inputs are the values ``tokens`` and ``positions``
    [T] i32 and ``rows`` [R] i32; the output is ``ids`` [R] i32. With ``num_ranks`` > 1 the config
    is that of one rank (``parts``).
    """
    graph = _Builder(config, dtype).build()
    return replace(graph, kv_in_codes=kv_in_codes, num_ranks=num_ranks)


class _Builder:
    """Appends ops and records the values and weights they name."""

    def __init__(self, config: DecoderConfig, dtype: str) -> None:
        self.config = config
        self.dtype = dtype
        self.ops: list[Op] = []
        self.values: dict[str, Value] = {}
        self.weights: dict[str, Weight] = {}

    def build(self) -> Graph:
        """Embedding, layers, head."""
        config = self.config
        for name, symbol in (("tokens", "T"), ("positions", "T"), ("rows", "R")):
            self.value(name, (symbol,), "i32")
        table = self.weight(EMBED, config.vocab_size, config.hidden_size)
        x = self.activation("x", config.hidden_size, "fp32")
        self.ops.append(Embed(tokens="tokens", y=x, table=table))
        for layer in range(config.num_layers):
            x = self.mlp(layer, self.attention(layer, x))
        final = self.norm("final_norm", x, "model.norm.weight")
        head = EMBED if config.tie_word_embeddings else LM_HEAD
        self.weight(head, config.vocab_size, config.hidden_size)
        self.value("logits", ("R", config.vocab_size), "fp32")
        self.value("ids", ("R",), "i32")
        self.ops.append(LmHead(x=final, rows="rows", logits="logits", weight=head))
        self.ops.append(Sample(logits="logits", ids="ids"))
        return Graph(config, self.dtype, tuple(self.ops), self.values, self.weights)

    def attention(self, layer: int, x: str) -> str:
        """x + o(attention(rope(q), rope(k), v)) of the normed x; returns the sum's name."""
        config, at = self.config, f"l{layer}"
        path = f"model.layers.{layer}"
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        normed = self.norm(f"{at}.attn_norm", x, f"{path}.input_layernorm.weight")
        q = self.head_projection(layer, "q", normed, heads)
        k = self.head_projection(layer, "k", normed, kv_heads)
        v_path = f"{path}.self_attn.v_proj"
        v = self.matmul(f"{at}.v", normed, v_path, kv_heads * dim, config.qkv_bias)
        kv = self.value(f"{at}.kv", (), "i32")
        self.ops.append(KvAppend(k=k, v=v, positions="positions", kv=kv, layer=layer))
        y = self.activation(f"{at}.attn", heads * dim)
        self.ops.append(
            Attention(
                q=q,
                kv=kv,
                y=y,
                layer=layer,
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=dim,
                scale=config.attention_scale,
                window=config.sliding_windows[layer] if config.sliding_windows else 0,
            )
        )
        o_path = f"{path}.self_attn.o_proj"
        o = self.matmul(f"{at}.o", y, o_path, config.hidden_size, config.o_bias)
        return self.add(f"{at}.x_attn", x, o)

    def head_projection(self, layer: int, which: str, normed: str, heads: int) -> str:
        """Projection, optional per-head norm, and rope of q or k."""
        config, name = self.config, f"l{layer}.{which}"
        path, dim = f"model.layers.{layer}.self_attn", config.head_dim
        width = heads * dim
        y = self.matmul(f"{name}_proj", normed, f"{path}.{which}_proj", width, config.qkv_bias)
        if config.qk_norm:
            weight = self.weight(f"{path}.{which}_norm.weight", dim)
            normed_y = self.activation(f"{name}_norm", width, "fp32")
            self.ops.append(
                QkNorm(
                    x=y,
                    y=normed_y,
                    weight=weight,
                    eps=config.rms_norm_eps,
                    num_heads=heads,
                    head_dim=dim,
                )
            )
            y = normed_y
        rotated = self.activation(name, width)
        self.ops.append(
            RotaryEmbedding(x=y, positions="positions", y=rotated, num_heads=heads, head_dim=dim)
        )
        return rotated

    def mlp(self, layer: int, x: str) -> str:
        """x + down(silu(gate) * up) of the normed x; returns the sum's name."""
        config, at = self.config, f"l{layer}"
        path, width, bias = f"model.layers.{layer}", config.intermediate_size, config.mlp_bias
        normed = self.norm(f"{at}.mlp_norm", x, f"{path}.post_attention_layernorm.weight")
        gate = self.matmul(f"{at}.gate", normed, f"{path}.mlp.gate_proj", width, bias)
        up = self.matmul(f"{at}.up", normed, f"{path}.mlp.up_proj", width, bias)
        h = self.activation(f"{at}.h", width)
        self.ops.append(SiluMul(gate=gate, up=up, y=h))
        down = self.matmul(f"{at}.down", h, f"{path}.mlp.down_proj", config.hidden_size, bias)
        return self.add(f"{at}.x", x, down)

    def norm(self, name: str, x: str, weight: str) -> str:
        self.weight(weight, self.config.hidden_size)
        y = self.activation(name, self.config.hidden_size)
        self.ops.append(RmsNorm(x=x, y=y, weight=weight, eps=self.config.rms_norm_eps))
        return y

    def matmul(self, name: str, x: str, path: str, width: int, bias: bool) -> str:
        depth = self.values[x].shape[1]
        assert isinstance(depth, int)
        weight = self.weight(f"{path}.weight", width, depth)
        bias_name = self.weight(f"{path}.bias", width) if bias else None
        y = self.activation(name, width, "fp32")
        self.ops.append(MatMul(x=x, y=y, weight=weight, bias=bias_name))
        return y

    def add(self, name: str, a: str, b: str) -> str:
        y = self.activation(name, self.config.hidden_size, "fp32")
        self.ops.append(Add(a=a, b=b, y=y))
        return y

    def activation(self, name: str, width: int, dtype: str | None = None) -> str:
        """A [T, width] value, in the graph's dtype unless told otherwise."""
        return self.value(name, ("T", width), dtype or self.dtype)

    def value(self, name: str, shape: tuple[int | str, ...], dtype: str) -> str:
        self.values[name] = Value(name, shape, dtype)
        return name

    def weight(self, name: str, *shape: int) -> str:
        self.weights[name] = Weight(name, shape)
        return name


def check_tensors(graph: Graph, checkpoint: Checkpoint) -> None:
    """Every weight of the graph is in the checkpoint in the graph's shape, and no other weight is.

    With tied embeddings an ``lm_head.weight`` may be there as well: opening the checkpoint has made
    sure that it holds the same values as the embedding. Raises CheckpointError naming the
    tensor, what was expected and what was found.
    """
    where = checkpoint.path or checkpoint.name
    for name, weight in graph.weights.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            near = difflib.get_close_matches(name, list(checkpoint.tensors)[:4096], 1)
            hint = f"; the nearest name there is {near[0]!r}" if near else ""
            raise CheckpointError(
                f"{where}: tensor {name!r} of shape {list(weight.shape)} is missing{hint}"
            )
        if info.shape != weight.shape:
            raise CheckpointError(
                f"{where}: tensor {name!r} has shape {list(info.shape)} ({info.dtype}), expected "
                f"{list(weight.shape)} by the config"
            )
    extra = [name for name in checkpoint.tensors if name not in graph.weights]
    if graph.config.tie_word_embeddings:
        extra = [name for name in extra if name != LM_HEAD]
    if extra:
        others = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UnsupportedModelError(
            f"{where}: tensor {sorted(extra)[0]!r}{others} is not part of a "
            f"{graph.config.architecture}; supported: checkpoints holding that architecture's "
            "tensors and nothing else"
        )
