"""Calls the kernels of an op-test library with NumPy arrays.

Arrays go in as float32 and are rounded and packed here; padding of every packed operand is NaN
where a kernel must not read, zero where the layout promises zeros.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sinterlm.ir.reference_codes import code_groups
from sinterlm.options import IsaName

SOURCE = Path(__file__).with_name("optest.cpp")
KV_CODES = ("-DKV_CODES=1",)  #: flags of the library whose KV pages hold codes
LANES, PANEL = 16, 64


def round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def to_bits(x: np.ndarray) -> np.ndarray:
    """float32 -> bf16 bits, round to nearest even, NaN kept."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    out = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), out)


def from_bits(b: np.ndarray) -> np.ndarray:
    return (b.astype(np.uint32) << 16).view(np.float32)


def rounded(x: np.ndarray, bf16: bool) -> np.ndarray:
    """What the kernel sees of x."""
    return from_bits(to_bits(x)) if bf16 else np.asarray(x, np.float32)


def elems(x: np.ndarray, bf16: bool) -> np.ndarray:
    return to_bits(x) if bf16 else np.ascontiguousarray(x, np.float32)


def floats(x: np.ndarray) -> np.ndarray:
    return from_bits(x) if x.dtype == np.uint16 else x


def pad(x: np.ndarray, width: int, value: float = 0.0) -> np.ndarray:
    """Last axis padded to ``width``."""
    gap = [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])]
    return np.pad(np.asarray(x, np.float32), gap, constant_values=value)


def panels(w: np.ndarray, k_padded: int, bf16: bool) -> np.ndarray:
    """[N, K] -> [N/64][K/P][64][P], zero padded."""
    pair = 2 if bf16 else 1
    n = round_up(w.shape[0], PANEL)
    full = np.zeros((n, k_padded), np.float32)
    full[: w.shape[0], : w.shape[1]] = w
    cut = elems(full, bf16).reshape(n // PANEL, PANEL, k_padded // pair, pair)
    return aligned(cut.transpose(0, 2, 1, 3))


def aligned(x: np.ndarray) -> np.ndarray:
    """A 64-byte aligned contiguous copy."""
    raw = np.empty(x.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    out = raw[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    out[...] = x
    return out


class Step(ctypes.Structure):
    """Mirrors Step of optest.cpp."""

    _fields_ = (
        ("num_tokens", ctypes.c_int32),
        ("num_seqs", ctypes.c_int32),
        *((n, ctypes.c_void_p) for n in ("token_ids", "positions", "query_start")),
        *((n, ctypes.c_void_p) for n in ("context_lens", "token_seq", "page_table")),
        ("page_table_stride", ctypes.c_int32),
        ("page_tokens", ctypes.c_int32),
        ("pages", ctypes.c_void_p),
        ("page_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
    )


@dataclass
class PagedStep:
    """Sequences with ``contexts`` tokens in all, the last ``queries`` of them in this step."""

    queries: list[int]
    contexts: list[int]
    heads: int  #: KV heads
    dim: int
    page_tokens: int
    bf16: bool
    seed: int = 0
    codes: bool = False  #: pages hold codes

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        per_seq = [round_up(c, self.page_tokens) // self.page_tokens for c in self.contexts]
        total = sum(per_seq) + 2
        order = rng.permutation(total).astype(np.int32)
        self.table = np.full((len(per_seq), max(per_seq) + 1), -(10**6), np.int32)
        for s, n in enumerate(per_seq):
            self.table[s, :n], order = order[:n], order[n:]
        kind = np.int8 if self.codes else np.uint16 if self.bf16 else np.float32
        shape = (total, self.heads, 2 * self.page_tokens * (self.dim + 4 * self.codes))
        # Codes cannot be NaN, their scales are: all bits set.
        nan = -1 if self.codes else to_bits(np.array(np.nan)) if self.bf16 else np.float32(np.nan)
        self.pages = aligned(np.full(shape, nan, kind))
        self.ask(self.queries)

    def ask(self, queries: list[int]) -> PagedStep:
        """The last ``queries`` tokens of each sequence become those of the step; returns self."""
        self.queries = queries
        self.query_start = np.cumsum([0, *self.queries]).astype(np.int32)
        self.context_lens = np.array(self.contexts, np.int32)
        pairs = zip(self.contexts, self.queries, strict=True)
        self.positions = np.concatenate([np.arange(c - q, c) for c, q in pairs]).astype(np.int32)
        self.token_seq = np.repeat(np.arange(len(self.queries)), self.queries).astype(np.int32)
        self.token_ids = np.zeros(len(self.positions), np.int32)
        return self

    @property
    def pair(self) -> int:
        """Tokens of a pair of V."""
        return 2 if self.bf16 and not self.codes else 1

    def slot(self, seq: int, pos: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Where k[heads, D/P, P] and v[heads, D] of a token lie, and its scales[heads, 2]."""
        page, slot = self.table[seq, pos // self.page_tokens], pos % self.page_tokens
        halves = self.pages[page].reshape(self.heads, 2, -1)
        elements = halves[:, :, : self.page_tokens * self.dim]
        ks = elements[:, 0].reshape(self.heads, -1, self.dim // self.pair, LANES, self.pair)
        vs = elements[:, 1].reshape(self.heads, -1, self.dim, self.pair)
        scales = None
        if self.codes:
            scales = halves[:, :, self.page_tokens * self.dim :].view(np.float32)[:, :, slot]
        return (
            ks[:, slot // LANES, :, slot % LANES, :],
            vs[:, slot // self.pair, :, slot % self.pair],
            scales,
        )

    def store(self, seq: int, pos: int, k: np.ndarray, v: np.ndarray) -> None:
        """Write k[heads, D], v[heads, D] as the kernel's layout says (even V clears odd)."""
        ks, vs, scales = self.slot(seq, pos)
        if scales is not None:
            (k, scales[:, 0]), (v, scales[:, 1]) = code_groups(k), code_groups(v)
        else:
            k, v = elems(k, self.bf16), elems(v, self.bf16)
        ks[...], vs[...] = k.reshape(ks.shape), v
        if self.pair == 2 and pos % 2 == 0:
            self.slot(seq, pos + 1)[1][...] = 0

    def load(self, seq: int, pos: int) -> tuple[np.ndarray, np.ndarray]:
        """k[heads, D], v[heads, D] as float32."""
        ks, vs, scales = self.slot(seq, pos)
        k, v = ks.reshape(self.heads, self.dim), np.ascontiguousarray(vs)
        if scales is None:
            return floats(k), floats(v)
        return k * scales[:, :1], v * scales[:, 1:]

    def struct(self) -> Step:
        out = Step(num_tokens=len(self.positions), num_seqs=len(self.queries))
        for name in ("token_ids", "positions", "query_start", "context_lens", "token_seq"):
            setattr(out, name, getattr(self, name).ctypes.data)
        out.page_table, out.page_table_stride = self.table.ctypes.data, self.table.shape[1]
        out.page_tokens, out.pages = self.page_tokens, self.pages.ctypes.data
        out.head_stride = self.pages.shape[2]
        out.page_stride = self.pages.shape[1] * self.pages.shape[2]
        return out


def call(fn: Any, *args: Any) -> None:
    """Call a C function with arrays as pointers, floats as float, ints as int."""
    given: list[Any] = []
    for a in args:
        if isinstance(a, np.ndarray):
            assert a.flags.c_contiguous
            given.append(ctypes.c_void_p(a.ctypes.data))
        elif isinstance(a, float):
            given.append(ctypes.c_float(a))
        elif a is None:
            given.append(ctypes.c_void_p(None))
        elif isinstance(a, Step):
            given.append(ctypes.byref(a))
        else:
            given.append(ctypes.c_int(a))
    assert fn(*given) == 0


class OpLib:
    """The kernels of one ISA level, in the library of ``SOURCE`` at ``path``; ``codes``: that of
    ``KV_CODES``."""

    def __init__(self, isa: IsaName, path: Path, codes: bool = False) -> None:
        self.isa = isa
        self.codes = codes
        self.lib = ctypes.CDLL(str(path))
        self.lib.ot_isa.restype = ctypes.c_char_p

    def cut(self, cols: int, rows: int, unit: int, granule: int, workers: int) -> np.ndarray:
        """The items of a GEMM, [items, 4] as (c0, c1, r0, r1) in the order they are claimed."""
        blocks = np.zeros((1 << 16, 4), np.int32)
        items = self.lib.ot_cut(
            cols, rows, unit, granule, workers, ctypes.c_void_p(blocks.ctypes.data), len(blocks)
        )
        assert items <= len(blocks)
        return blocks[:items]

    def residual(
        self,
        a: np.ndarray,
        w: np.ndarray,
        bias: np.ndarray | None,
        norm: np.ndarray,
        x: np.ndarray,
        *,
        bf16: bool,
        threads: int = 1,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """a[T, K], w[H, K], x[T, H] -> x'[T, H], xw[T, H], ssq[T, Hp/16]."""
        (rows, k), h = a.shape, w.shape[0]
        kp, hp = round_up(k, LANES), round_up(h, LANES)
        out, ssq = (
            np.full((rows, hp), np.nan, np.float32),
            np.zeros((rows, hp // LANES), np.float32),
        )
        xw = np.zeros((rows, hp), np.uint16 if bf16 else np.float32)
        call(
            self.lib.ot_residual, int(bf16), threads, rows, kp, hp,
            elems(pad(a, kp), bf16), panels(w, kp, bf16), None if bias is None else pad(bias, hp),
            pad(norm, hp), pad(x, hp), out, xw, ssq,
        )  # fmt: skip
        assert not out[:, h:].any()
        assert not floats(xw)[:, h:].any()
        return out[:, :h], floats(xw)[:, :h], ssq

    def gate_up(
        self,
        xw: np.ndarray,
        gate: np.ndarray,
        up: np.ndarray,
        ssq: np.ndarray,
        eps: float,
        gate_bias: np.ndarray | None = None,
        up_bias: np.ndarray | None = None,
        *,
        bf16: bool,
        threads: int = 1,
    ) -> np.ndarray:
        """xw[T, H], gate[F, H], up[F, H] -> h[T, F]."""
        (rows, h), f = xw.shape, gate.shape[0]
        hp, fp = round_up(h, LANES), round_up(f, PANEL)

        def interleave(g: np.ndarray, u: np.ndarray) -> np.ndarray:
            both = np.zeros((fp // PANEL, 2, PANEL, *g.shape[1:]), np.float32)
            for i, part in enumerate((g, u)):
                full = np.zeros((fp, *g.shape[1:]), np.float32)
                full[:f] = part
                both[:, i] = full.reshape(-1, PANEL, *g.shape[1:])
            return both.reshape(-1, *g.shape[1:])

        bias = None if gate_bias is None else interleave(gate_bias, up_bias)
        out = np.full((rows, fp), 0x7FC0, np.uint16) if bf16 else np.full((rows, fp), np.nan, "f4")
        call(
            self.lib.ot_gate_up, int(bf16), threads, rows, h, hp, fp, elems(pad(xw, hp), bf16), ssq,
            panels(interleave(gate, up), hp, bf16), bias, float(eps), out,
        )  # fmt: skip
        assert not floats(out)[:, f:].any()
        return floats(out)[:, :f]

    def lm_head(
        self,
        xw: np.ndarray,
        ssq: np.ndarray,
        rows: np.ndarray,
        w: np.ndarray,
        eps: float,
        *,
        bf16: bool,
        threads: int = 1,
    ) -> np.ndarray:
        """xw[T, H], rows[R], w[V, H] -> logits[R, V]."""
        h, v = xw.shape[1], w.shape[0]
        hp, vp = round_up(h, LANES), round_up(v, PANEL)
        logits = np.full((len(rows), vp), np.nan, np.float32)
        gathered = np.zeros((len(rows), hp), np.uint16 if bf16 else np.float32)
        call(
            self.lib.ot_lm_head, int(bf16), threads, len(rows), h, hp, v, vp,
            elems(pad(xw, hp), bf16), ssq, np.asarray(rows, np.int32), panels(w, hp, bf16),
            float(eps), logits, gathered,
        )  # fmt: skip
        return logits[:, :v]

    def embed(
        self, ids: np.ndarray, table: np.ndarray, norm: np.ndarray, *, bf16: bool, tied: bool,
        threads: int = 1,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
        """table[V, H] -> x[T, H], xw[T, H], ssq[T, Hp/16]."""
        h = table.shape[1]
        hp = round_up(h, LANES)
        step = PagedStep([len(ids)], [len(ids)], 1, 16, 16, bf16)
        step.token_ids = np.asarray(ids, np.int32)
        x = np.full((len(ids), hp), np.nan, np.float32)
        xw = np.zeros((len(ids), hp), np.uint16 if bf16 else np.float32)
        ssq = np.zeros((len(ids), hp // LANES), np.float32)
        packed = panels(table, hp, bf16) if tied else elems(pad(table, hp), bf16)
        call(
            self.lib.ot_embed, int(bf16), threads, step.struct(), h, hp, packed, int(tied),
            pad(norm, hp), x, xw, ssq,
        )  # fmt: skip
        return x[:, :h], floats(xw)[:, :h], ssq

    def qkv(
        self, step: PagedStep, xw: np.ndarray, ssq: np.ndarray, w: np.ndarray,
        bias: np.ndarray | None, q_norm: np.ndarray | None, k_norm: np.ndarray | None,
        cos: np.ndarray, sin: np.ndarray, eps: float, qk_eps: float, num_heads: int, *,
        threads: int = 1,
    ) -> np.ndarray:  # fmt: skip
        """xw[T, H], w[heads·D, H] in packed head order -> q[T, Hq·D]; k, v into step's pages."""
        (rows, h), d = xw.shape, step.dim
        hp, qp = round_up(h, LANES), num_heads * d
        q = np.zeros((rows, qp), np.uint16 if step.bf16 else np.float32)
        call(
            self.lib.ot_qkv, int(step.bf16), threads, step.struct(), h, hp, num_heads, step.heads,
            d, elems(pad(xw, hp), step.bf16), ssq, panels(w, hp, step.bf16), bias, q_norm, k_norm,
            cos, sin, float(eps), float(qk_eps), q,
        )  # fmt: skip
        return floats(q)

    def attention(
        self, step: PagedStep, q: np.ndarray, num_heads: int, scale: float, window: int = 0, *,
        threads: int = 1, parts_floats: int = 1 << 20,
    ) -> np.ndarray:  # fmt: skip
        """q[T, Hq·D] -> y[T, Hq·D]; ``parts_floats`` 0 keeps each block on one worker."""
        y = np.full(q.shape, 0x7FC0, np.uint16) if step.bf16 else np.full(q.shape, np.nan, "f4")
        call(
            self.lib.ot_attention, int(step.bf16), threads, step.struct(), num_heads, step.heads,
            step.dim, float(scale), window, elems(q, step.bf16), y, parts_floats,
        )  # fmt: skip
        return floats(y)
