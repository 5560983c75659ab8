"""Small decoders for tests: configs, graphs of plain ops, seeded weights."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st

from sinterlm.ir.graph import DecoderConfig, Graph, Rope, Value, Weight
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


def config(
    *,
    vocab: int = 50,
    hidden: int = 48,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    ffn: int = 80,
    tied: bool = False,
    qk_norm: bool = False,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    windows: tuple[int, ...] = (),
) -> DecoderConfig:
    rope = Rope(tuple(100.0 ** (-2 * i / head_dim) for i in range(head_dim // 2)), 1.25)
    return DecoderConfig(
        architecture="TestForCausalLM",
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=ffn,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope=rope,
        tie_word_embeddings=tied,
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        sliding_windows=windows,
    )


@st.composite
def configs(draw: st.DrawFn) -> DecoderConfig:
    """Odd shapes: hidden and ffn that are no multiple of 16, any GQA ratio, any extras."""
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    layers = draw(st.integers(1, 3))
    window = st.sampled_from([0, 1, 3, 7])
    return config(
        vocab=draw(st.integers(2, 150)),
        hidden=draw(st.sampled_from([16, 24, 37, 64, 100])),
        layers=layers,
        heads=kv_heads * draw(st.sampled_from([1, 4, 5, 7])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([4, 16, 20, 80])),
        ffn=draw(st.sampled_from([10, 64, 70, 129])),
        tied=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        o_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        windows=tuple(draw(window) for _ in range(layers)) if draw(st.booleans()) else (),
    )


def plain_graph(c: DecoderConfig, dtype: str = "bf16") -> Graph:
    """One decoder as plain ops, value names all its own (passes must not depend on names)."""
    ops: list[Op] = []
    values: dict[str, Value] = {}
    weights: dict[str, Weight] = {}
    eps, heads, kv_heads, dim = c.rms_norm_eps, c.num_heads, c.num_kv_heads, c.head_dim

    def value(name: str, *shape: int | str, dtype: str = "fp32") -> str:
        values[name] = Value(name, shape, dtype)
        return name

    def weight(name: str, *shape: int) -> str:
        weights[name] = Weight(name, shape)
        return name

    def norm(name: str, x: str) -> str:
        y = value(f"{name}:y", "T", c.hidden_size, dtype=dtype)
        ops.append(RmsNorm(x=x, y=y, weight=weight(f"{name}.weight", c.hidden_size), eps=eps))
        return y

    def linear(name: str, x: str, n: int, bias: bool) -> str:
        k = values[x].shape[-1]
        assert isinstance(k, int)
        y, w = value(f"{name}:y", "T", n), weight(f"{name}.weight", n, k)
        ops.append(MatMul(x=x, y=y, weight=w, bias=weight(f"{name}.bias", n) if bias else None))
        return y

    def head_wise(name: str, x: str, n: int) -> str:
        if c.qk_norm:
            w = weight(f"{name}_norm.weight", dim)
            y = value(f"{name}_normed", "T", n * dim)
            ops.append(QkNorm(x=x, y=y, weight=w, eps=eps, num_heads=n, head_dim=dim))
            x = y
        y = value(f"{name}_rotated", "T", n * dim, dtype=dtype)
        ops.append(RotaryEmbedding(x=x, positions="positions", y=y, num_heads=n, head_dim=dim))
        return y

    def add(name: str, a: str, b: str) -> str:
        ops.append(Add(a=a, b=b, y=value(name, "T", c.hidden_size)))
        return name

    for name, symbol in (("tokens", "T"), ("positions", "T"), ("rows", "R")):
        value(name, symbol, dtype="i32")
    table = weight("embed", c.vocab_size, c.hidden_size)
    x = value("stream", "T", c.hidden_size)
    ops.append(Embed(tokens="tokens", y=x, table=table))
    for i in range(c.num_layers):
        n = norm(f"{i}.attn_norm", x)
        q, k, v = (
            linear(f"{i}.{p}", n, h * dim, c.qkv_bias)
            for p, h in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = head_wise(f"{i}.q", q, heads), head_wise(f"{i}.k", k, kv_heads)
        kv = value(f"{i}.kv", dtype="i32")
        ops.append(KvAppend(k=k, v=v, positions="positions", kv=kv, layer=i))
        y = value(f"{i}.attn", "T", heads * dim, dtype=dtype)
        window = c.sliding_windows[i] if c.sliding_windows else 0
        ops.append(
            Attention(
                q=q,
                kv=kv,
                y=y,
                layer=i,
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=dim,
                scale=c.attention_scale,
                window=window,
            )
        )
        x = add(f"{i}.mid", linear(f"{i}.o", y, c.hidden_size, c.o_bias), x)
        n = norm(f"{i}.mlp_norm", x)
        gate, up = (linear(f"{i}.{p}", n, c.intermediate_size, c.mlp_bias) for p in ("gate", "up"))
        h = value(f"{i}.h", "T", c.intermediate_size, dtype=dtype)
        ops.append(SiluMul(gate=gate, up=up, y=h))
        x = add(f"{i}.out", x, linear(f"{i}.down", h, c.hidden_size, c.mlp_bias))
    n = norm("final_norm", x)
    head = table if c.tie_word_embeddings else weight("head", c.vocab_size, c.hidden_size)
    value("scores", "R", c.vocab_size)
    ops.append(LmHead(x=n, rows="rows", logits="scores", weight=head))
    value("ids", "R", dtype="i32")
    ops.append(Sample(logits="scores", ids="ids"))
    return Graph(c, dtype, tuple(ops), values, weights)


def random_weights(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 tensors whose activations stay near 1."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, w in graph.weights.items():
        scale = 1 / math.sqrt(w.shape[-1]) if len(w.shape) == 2 else 0.3
        tensor = rng.standard_normal(w.shape) * scale
        if "norm" in name:
            tensor += 1
        if name in ("embed", "head"):
            tensor *= 3
        tensors[name] = tensor.astype(np.float32)
    return tensors
