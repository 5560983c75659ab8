"""GPU kernels on NumPy arrays: packs what they read, poisons what they must not, runs them with
Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sinterlm.backends.gpu.devices import Rounding
from sinterlm.backends.gpu.interpreter import Order, run_kernel
from sinterlm.backends.gpu.operands import WIDE, operand
from sinterlm.ir.bf16 import from_bf16, to_bf16
from sinterlm.ir.fp8 import FP8_NAN, Fp8Name, from_fp8, to_fp8
from sinterlm.ir.plan import PackedTensor
from sinterlm.ir.quant import CodedMatrix, GemmFormat, PanelShape
from sinterlm.passes.coding import in_format
from sinterlm.passes.packing_codes import PanelWriter

NAN16 = np.uint16(0x7FC0)
EPS, QK_EPS = 1e-5, 1e-6
#: To fp8; a test of both sets it.
ROUNDING: Rounding = "cvt"
#: Elements of NaN behind each row of a wide matrix; None = it lies in tiles. Tests set it.
PADDING: int | None = None


def tiles(w: np.ndarray) -> np.ndarray:
    """[N, K] -> [N/64][K/64][64][64] bf16, N padded with zeros."""
    n, k = w.shape
    full = np.zeros((-(-n // 64) * 64, k), np.float32)
    full[:n] = w
    cut = to_bf16(full).reshape(-1, 64, k // 64, 64)
    return np.ascontiguousarray(cut.transpose(0, 2, 1, 3))


def pitched(w: np.ndarray) -> np.ndarray:
    """[N, K] -> [N][K + PADDING] bf16, N padded with zeros."""
    full = np.zeros((-(-len(w) // 64) * 64, w.shape[1]), np.float32)
    full[: len(w)] = w
    padded = np.full((len(full), w.shape[1] + (PADDING or 0)), NAN16)
    padded[:, : w.shape[1]] = to_bf16(full)
    return padded


def matrix(
    w: np.ndarray, form: GemmFormat | None, name: str = "w"
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arguments and constants of a kernel that reads w[N, K], in bf16 or in codes."""
    if form is None:
        none = np.zeros(0, np.float32)
        if PADDING is not None:
            rows = {name: pitched(w), "w_scale": none, "w_offset": none}
            return rows, {**WIDE, "W_PITCH": w.shape[1] + PADDING}
        return {name: tiles(w), "w_scale": none, "w_offset": none}, WIDE
    n, k = w.shape
    padded = -(-n // 64) * 64
    size = padded // 64 * PanelShape(form, k).nbytes
    tensor = PackedTensor("t", "tiles", "int4", padded, k, k, (), 0, size, form)
    writer = PanelWriter(tensor, padded)
    writer.put(0, coded(w, form))
    packed = writer.bytes().reshape(-1)
    assert packed.nbytes == size
    read = operand(tensor, ROUNDING)
    starts = [0 if arg == "null" else int(arg.split(":")[1]) for arg in read.args]
    kinds = (np.uint8, np.float16 if form.scale_bytes == 2 else np.float32, np.float32)
    found = [packed[at:].view(kind) for at, kind in zip(starts, kinds, strict=True)]
    if form.symmetric:
        found[2] = np.zeros(0, np.float32)
    return dict(zip((name, "w_scale", "w_offset"), found, strict=True)), read.constants


def coded(w: np.ndarray, form: GemmFormat) -> CodedMatrix:
    """w[N, K] in the codes of ``form``; fp8 by groups or blocks, as checkpoints bring it."""
    if not form.is_fp8 or form.group == 0:
        return in_format(w, form)
    (n, k), rows, group = w.shape, form.rows, form.group
    grid = (-(-n // rows), -(-k // group))
    full = np.zeros((grid[0] * rows, grid[1] * group), np.float32)
    full[:n, :k] = w
    largest = np.abs(full).reshape(grid[0], rows, grid[1], group).max(axis=(1, 3))
    scales = np.repeat(np.maximum(largest, 1e-6) / np.float32(448), rows, axis=0)[:n]
    numbers = to_fp8(w / np.repeat(scales, group, axis=1)[:, :k], "e4m3fn")
    return CodedMatrix(numbers, scales, None, 8, group, "e4m3fn").written_as(form.code)


def meaning(w: np.ndarray, form: GemmFormat | None) -> tuple[np.ndarray, np.ndarray]:
    """What a kernel multiplies for w[N, K], in float64, and the size of what it adds up."""
    if form is None:
        return w.astype("f8"), np.abs(w).astype("f8")
    stored = coded(w, form)
    group = np.arange(w.shape[1]) // (form.group or w.shape[1])
    scale, codes = stored.scales.astype("f8")[:, group], stored.codes.astype("f8")
    if stored.code != "int":
        value = scale * from_fp8(stored.codes, stored.code)
        return value, np.abs(value)
    if stored.offsets is None:
        value = scale * (codes - (1 << (form.bits - 1)))
        return value, np.abs(value)
    offset = stored.offsets.astype("f8")[:, group]
    return scale * codes + offset, np.abs(scale) * codes + np.abs(offset)


def nan16(*shape: int) -> np.ndarray:
    return np.full(shape, NAN16)


def nan32(*shape: int) -> np.ndarray:
    return np.full(shape, np.nan, np.float32)


@dataclass(frozen=True)
class Tile:
    """How a GEMM is cut."""

    BM: int = 16
    BN: int = 32
    BK: int = 64
    SPLIT: int = 1
    GROUP_M: int = 1
    NUM_XCD: int = 1

    def constants(self, *, split: bool = True) -> dict[str, Any]:
        found = {**vars(self), "CACHE": ".cg", "DRAIN": ""}
        return found if split else {k: v for k, v in found.items() if k not in ("SPLIT", "DRAIN")}

    def scratch(self, rows: int, tiles_n: int, halves: int = 1) -> dict[str, np.ndarray]:
        """Poisoned partial sums and counters at zero."""
        count = -(-rows // self.BM) * tiles_n
        return {
            "parts": nan32(count * self.SPLIT * halves * self.BM * self.BN),
            "counters": np.zeros(count, np.int32),
        }

    def grid(self, rows: int, tiles_n: int) -> tuple[int]:
        return (-(-rows // self.BM) * tiles_n * self.SPLIT,)


def residual(
    a: np.ndarray, w: np.ndarray, bias: np.ndarray | None, norm: np.ndarray, x: np.ndarray,
    tile: Tile, order: Order = "forward", form: GemmFormat | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """a[T, K], w[N, K], x[T, N] -> x'[T, N], xw[T, N], ssq[T, N/16]. One more row of each output
    is poisoned and must stay so."""
    (rows, k), n = a.shape, len(w)
    out = np.concatenate([x, nan32(1, n)]).astype(np.float32)
    xw, ssq = nan16(rows + 1, n), nan32(rows + 1, n // 16)
    scratch = tile.scratch(rows, n // tile.BN)
    stored, constants = matrix(w, form)
    run_kernel(
        "residual_matmul", tile.grid(rows, n // tile.BN),
        {"a": np.concatenate([to_bf16(a), nan16(1, k)]), **stored,
         "bias": nan32(n) if bias is None else bias, "norm": norm, "x": out, "xw": xw, "ssq": ssq,
         "num_tokens": rows, **scratch},
        {"N": n, "K": k, "A_PITCH": k, "HAS_BIAS": bias is not None, **constants,
         **tile.constants()}, order,
    )  # fmt: skip
    assert not scratch["counters"].any()
    assert np.isnan(out[rows]).all() and np.isnan(ssq[rows]).all() and (xw[rows] == NAN16).all()
    return out[:rows], from_bf16(xw[:rows]), ssq[:rows]


def interleave(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """64 rows of the one, 64 of the other, and so on, each padded with zeros to 64."""
    padded = -(-len(first) // 64) * 64
    both = np.zeros((2, padded, *first.shape[1:]), np.float32)
    both[0, : len(first)], both[1, : len(first)] = first, second
    cut = both.reshape(2, padded // 64, 64, *first.shape[1:])
    return np.ascontiguousarray(np.swapaxes(cut, 0, 1)).reshape(-1, *first.shape[1:])


def gate_up(
    xw: np.ndarray, ssq: np.ndarray, gate: np.ndarray, up: np.ndarray,
    biases: tuple[np.ndarray, np.ndarray] | None, tile: Tile, order: Order = "forward",
    form: GemmFormat | None = None,
) -> np.ndarray:  # fmt: skip
    """xw[T, H], gate and up [F, H] -> h[T, F]; the padding of h is checked to be zeros."""
    (rows, hidden), ffn = xw.shape, len(gate)
    padded = -(-ffn // 64) * 64
    h = nan16(rows + 1, padded)
    scratch = tile.scratch(rows, padded // tile.BN, 2)
    stored, constants = matrix(interleave(gate, up), form)
    run_kernel(
        "norm_gate_up_act", tile.grid(rows, padded // tile.BN),
        {"xw": to_bf16(xw), "ssq": ssq, **stored, "h": h,
         "bias": nan32(2 * padded) if biases is None else interleave(*biases),
         "num_tokens": rows, **scratch},
        {"F": padded, "H": hidden, "EPS": EPS, "HAS_BIAS": biases is not None, **constants,
         **tile.constants()}, order,
    )  # fmt: skip
    assert (h[rows] == NAN16).all() and not h[:rows, ffn:].any()
    return from_bf16(h[:rows, :ffn])


@dataclass
class Paged:
    """Sequences of ``contexts`` tokens, the last ``queries`` of them in this step, over pages that
    hold NaN wherever nothing was stored: bf16, or fp8 numbers that are times ``scales``."""

    queries: list[int]
    contexts: list[int]
    heads: int  #: KV heads
    dim: int
    page_tokens: int
    seed: int = 0
    fp8: Fp8Name | None = None
    scales: tuple[float, float] = (1.0, 1.0)  #: of K and V
    k: np.ndarray = field(init=False)  #: [pages, heads, page_tokens, dim]
    v: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        per_seq = [-(-c // self.page_tokens) for c in self.contexts]
        order = rng.permutation(sum(per_seq) + 2).astype(np.int32)
        self.table = np.full((len(per_seq), max(per_seq) + 1), -(10**6), np.int32)
        for seq, count in enumerate(per_seq):
            self.table[seq, :count], order = order[:count], order[count:]
        shape = (sum(per_seq) + 2, self.heads, self.page_tokens, self.dim)
        self.k, self.v = (
            nan16(*shape) if self.fp8 is None else np.full(shape, FP8_NAN[self.fp8], np.uint8)
            for _ in range(2)
        )
        self.query_start = np.cumsum([0, *self.queries]).astype(np.int32)
        self.context_lens = np.array(self.contexts, np.int32)
        pairs = list(zip(self.contexts, self.queries, strict=True))
        self.positions = np.concatenate([np.arange(c - q, c) for c, q in pairs]).astype(np.int32)
        self.seqs = np.repeat(np.arange(len(self.queries)), self.queries)
        self.slots = np.array(
            [self.table[s, p // self.page_tokens] * self.page_tokens + p % self.page_tokens
             for s, p in zip(self.seqs, self.positions, strict=True)], np.int32,
        )  # fmt: skip

    def store(self, seq: int, k: np.ndarray, v: np.ndarray) -> None:
        """k, v [len, heads, dim] become the first tokens of a sequence."""
        for pos in range(len(k)):
            page, slot = self.table[seq, pos // self.page_tokens], pos % self.page_tokens
            for to, values, scale in zip((self.k, self.v), (k, v), self.scales, strict=True):
                to[page, :, slot] = (
                    to_bf16(values[pos]) if self.fp8 is None
                    else to_fp8(values[pos] / np.float32(scale), self.fp8)
                )  # fmt: skip

    def load(self, which: np.ndarray) -> np.ndarray:
        """[T, heads, dim] of the step's tokens from ``self.k`` or ``self.v``."""
        pages, within = self.slots // self.page_tokens, self.slots % self.page_tokens
        found = which[pages, :, within]
        if self.fp8 is None:
            return from_bf16(found)
        return from_fp8(found, self.fp8) * np.float32(self.scales[which is self.v])

    def strides(self) -> dict[str, int]:
        return {
            "page_tokens": self.page_tokens,
            "page_stride": self.heads * self.page_tokens * self.dim,
            "token_stride": self.dim,
            "head_stride": self.page_tokens * self.dim,
        }


def qkv(
    step: Paged, xw: np.ndarray, ssq: np.ndarray, w: np.ndarray, bias: np.ndarray | None,
    norms: tuple[np.ndarray, np.ndarray] | None, tables: tuple[np.ndarray, np.ndarray],
    group: int, tile: Tile, order: Order = "forward", form: GemmFormat | None = None,
) -> np.ndarray:  # fmt: skip
    """xw[T, H], w[heads · D, H] in packed order -> q[T, Hq · D]; k, v go to the step's pages."""
    (rows, hidden), dim = xw.shape, step.dim
    tiles_n = step.heads * (group + 2) * (dim // 2 // tile.BN)
    q, scratch = nan16(rows + 1, step.heads * group * dim), tile.scratch(rows, tiles_n, 2)
    q_norm, k_norm = norms or (nan32(dim), nan32(dim))
    stored, constants = matrix(w, form)
    run_kernel(
        "norm_qkv_rope_kv", tile.grid(rows, tiles_n),
        {"xw": to_bf16(xw), "ssq": ssq, **stored,
         "bias": nan32(len(w)) if bias is None else bias, "q_norm": q_norm, "k_norm": k_norm,
         "cos": tables[0], "sin": tables[1], "positions": step.positions, "kv_slots": step.slots,
         "q": q, "k_base": step.k, "v_base": step.v, "k_inverse": 1 / step.scales[0],
         "v_inverse": 1 / step.scales[1], "num_tokens": rows, **step.strides(),
         **scratch},
        {"H": hidden, "HKV": step.heads, "GROUP": group, "D": dim, "EPS": EPS, "QK_EPS": QK_EPS,
         "HAS_BIAS": bias is not None, "QK_NORM": norms is not None, "KV_FP8": step.fp8 or "",
         "KV_ROUNDING": ROUNDING, **constants, **tile.constants()}, order,
    )  # fmt: skip
    assert (q[rows] == NAN16).all()
    return from_bf16(q[:rows])


def attention(
    step: Paged, q: np.ndarray, group: int, window: int = 0, segments: int = 1, tile: int = 16,
    rows_per_block: int = 16, decode: bool = False, order: Order = "forward",
) -> np.ndarray:  # fmt: skip
    """q[T, Hq · D] -> y[T, Hq · D]."""
    tokens, per_block = len(q), rows_per_block // group
    blocks = len(step.queries) if decode else tokens // per_block + len(step.queries)
    y, counters = nan16(*q.shape), np.zeros(blocks * step.heads, np.int32)
    size = blocks * step.heads * segments * rows_per_block
    run_kernel(
        "attention", (blocks, step.heads, segments),
        {"q": to_bf16(q), "y": y, "k_base": step.k, "v_base": step.v, "k_scale": step.scales[0],
         "v_scale": step.scales[1], "page_table": step.table,
         "query_start": step.query_start, "context_lens": step.context_lens,
         "part_o": nan32(size * step.dim), "part_ml": nan32(size * 2), "counters": counters,
         "num_seqs": len(step.queries), "table_stride": step.table.shape[1], **step.strides()},
        {"HKV": step.heads, "GROUP": group, "D": step.dim, "SCALE": step.dim**-0.5,
         "WINDOW": window, "KV_FP8": step.fp8 or "", "DECODE": decode, "SEQS": 8,
         "BM": rows_per_block, "TILE": tile, "SEGMENTS": segments, "DRAIN": ""}, order,
    )  # fmt: skip
    assert not counters.any()
    return from_bf16(y)


def draw(
    xw: np.ndarray, ssq: np.ndarray, rows: list[int], w: np.ndarray, temperature: list[float],
    seeds: list[int], draws: list[int], tile: Tile, slots: list[int] | None = None,
    form: GemmFormat | None = None, is_normed: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """xw[T, H], w[V, H] -> (logits[R, V], ids[R], logprobs[R], drawn[slots])."""
    count, (vocab, hidden) = len(rows), w.shape
    padded = -(-vocab // 64) * 64
    blocks = padded // tile.BN
    logits, drawn = nan32(count, padded), np.full(4, -1, np.int32)
    best = {
        "best": nan32(3, count, blocks),
        "tops": nan32(count, blocks),
        "best_ids": np.full((count, blocks), -1, np.int32),
    }
    ids, logprobs = np.full(count, -1, np.int32), nan32(count)
    stored, constants = matrix(w, form)
    run_kernel(
        "lm_head", (-(-count // tile.BM) * blocks,),
        {"xw": to_bf16(xw), "ssq": ssq, "rows": np.array(rows, np.int32), **stored,
         "temperature": np.array(temperature, np.float32), "seeds": np.array(seeds, np.uint64),
         "draws": np.array(draws, np.int32), "logits": logits, "num_rows": count,
         "is_normed": int(is_normed), **best},
        {"H": hidden, "V": vocab, "VP": padded, "EPS": EPS, "KEEP_LOGITS": True, **constants,
         **tile.constants(split=False)},
    )  # fmt: skip
    width = 1 << (blocks - 1).bit_length()
    run_kernel(
        "merge_rows", (count,),
        {**best, "slots": np.array(slots or [-1] * count, np.int32), "ids": ids,
         "logprobs": logprobs, "drawn": drawn},
        {"BLOCKS": blocks, "WIDTH": width},
    )  # fmt: skip
    return logits[:, :vocab], ids, logprobs, drawn


def final_norm(
    x: np.ndarray, ssq: np.ndarray, norm: np.ndarray, stride: int, width: int
) -> np.ndarray:
    """x[T, H] -> hidden[T, H], written to rows of ``stride``; nothing else may be touched."""
    rows, hidden = x.shape
    out = nan16(rows + 1, stride)
    run_kernel(
        "final_norm", (rows, hidden // width),
        {"x": np.concatenate([x, nan32(1, hidden)]).astype("f4"), "ssq": ssq, "norm": norm,
         "hidden": out, "hidden_stride": stride},
        {"H": hidden, "EPS": EPS, "BN": width},
    )  # fmt: skip
    assert (out[rows] == NAN16).all() and (out[:, hidden:] == NAN16).all()
    return from_bf16(out[:rows, :hidden])


def embed(
    tokens: list[int], table: np.ndarray, norm: np.ndarray, in_tiles: bool, slots: list[int],
    drawn: list[int], width: int, form: GemmFormat | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """table[V, H] -> x[T, H], xw[T, H], ssq[T, H/16]."""
    rows, hidden = len(tokens), table.shape[1]
    x, xw, ssq = nan32(rows, hidden), nan16(rows, hidden), nan32(rows, hidden // 16)
    stored, constants = matrix(table, form, "table")
    if not in_tiles:
        stored["table"] = to_bf16(table)
    run_kernel(
        "embed_norm", (rows, hidden // width),
        {"tokens": np.array(tokens, np.int32), "slots": np.array(slots, np.int32),
         "drawn": np.array(drawn, np.int32), **stored,
         "norm": norm, "x": x, "xw": xw, "ssq": ssq},
        {"H": hidden, "IN_TILES": in_tiles, "BN": width, **constants},
    )  # fmt: skip
    return x, from_bf16(xw), ssq
