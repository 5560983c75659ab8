"""From a Plan to the launch table of one device: five launches per layer, three more, and one for
whoever wants hidden states; where matrices are packed for a vendor's GEMM, a GEMM of many rows is
two launches.

Nothing here needs Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sinterlm.backends.gpu import vendor
from sinterlm.backends.gpu.devices import Device
from sinterlm.backends.gpu.kv_pages import fp8_of_pages, keys_of_tile, kv_scales, number
from sinterlm.backends.gpu.operands import Operand, operand
from sinterlm.backends.gpu.shapes import check_shape
from sinterlm.backends.gpu.signatures import SIGNATURES
from sinterlm.backends.gpu.table import (
    LEFT_OUT,
    Axis,
    Buffer,
    Choice,
    Kernel,
    Launch,
    Table,
    Unit,
)
from sinterlm.backends.gpu.tuning import Entry, TileTable, cut_gemm, divisor, read_tiles
from sinterlm.errors import CompileError
from sinterlm.ir import ops
from sinterlm.ir.plan import Plan

#: Most sequences of a step; attention of prompts looks through so many.
MAX_SEQS = 256

_ONE = Axis("1")
_ALIGN = 256  #: bytes of the arenas' buffers per unit, so that pointers are aligned for any count

#: Constants of a GEMM that its epilogue does not have.
_PRODUCT_CONSTANTS = ("K", "A_PITCH")


def launch_table(plan: Plan, device: Device, tiles: TileTable | None = None) -> Table:
    """Every launch of a step; ``tiles`` None = the shipped ones. Raises UnsupportedModelError for a
    shape no kernel has."""
    return _Builder(plan, device, tiles or read_tiles(device.name)).build()


class _Builder:
    """One table; kernels are numbered as they are asked for."""

    def __init__(self, plan: Plan, device: Device, tiles: TileTable) -> None:
        check_shape(plan)
        self.plan, self.device, self.tiles = plan, device, tiles
        self.config = plan.graph.config
        self.kv_fp8 = fp8_of_pages(plan.graph, device)
        self.kernels: list[Kernel] = []
        self.choices: list[Choice] = []
        self.slots: dict[str, tuple[object, ...]] = {}
        self.scratch: dict[tuple[str, Unit], int] = {}
        self.tensors = {t.name: t for t in plan.layout.tensors}

    def build(self) -> Table:
        """Walk the ops."""
        launches = [launch for op in self.plan.graph.ops for launch in self.launches(op)]
        facts = self.facts()
        if any(kernel.is_vendor for kernel in self.kernels):
            facts |= {"vendor_least_rows": vendor.LEAST_ROWS, "vendor_rows_step": vendor.ROWS_STEP}
        return Table(
            self.device.name, facts, self.buffers(), tuple(self.kernels), tuple(launches),
            tuple(self.choices),
        )  # fmt: skip

    def facts(self) -> dict[str, int]:
        """What a host checks its arguments by."""
        c, layout = self.config, self.plan.layout
        return {
            "layers": c.num_layers, "hidden": c.hidden_size, "heads": c.num_heads,
            "kv_heads": c.num_kv_heads, "head_dim": c.head_dim, "vocab": c.vocab_size,
            "kv_bytes": 1 if self.kv_fp8 else 2, "max_seqs": MAX_SEQS, "warp": self.device.warp,
            "shared_bytes": self.device.shared_bytes, "layout_hash": layout.layout_hash,
            "weights_bytes": layout.nbytes,
        }  # fmt: skip

    def buffers(self) -> tuple[Buffer, ...]:
        """The plan's activations, and what kernels keep to themselves behind them. Hidden states
        lie where ``h`` is no longer needed, if they fit."""
        hidden = 2 * self.config.hidden_size
        h = next(b for b in self.plan.memory.buffers if b.name == "h")
        if h.nbytes < hidden:
            self.need("hidden", "T", hidden)
        found = [
            Buffer(b.name, b.unit, b.nbytes, b.offset)
            for b in self.plan.memory.buffers
            if b.name != "gathered"
        ]
        if h.nbytes >= hidden:
            found.append(Buffer("hidden", "T", hidden, h.offset))
        ends: dict[str, int] = {"T": self.plan.memory.bytes_per_token,
                                "R": self.plan.memory.bytes_per_row}  # fmt: skip
        for (name, unit), nbytes in self.scratch.items():
            at = -(-ends.get(unit, 0) // _ALIGN) * _ALIGN
            found.append(Buffer(name, unit, nbytes, at))
            ends[unit] = at + -(-nbytes // _ALIGN) * _ALIGN
        return tuple(found)

    # -- ops -------------------------------------------------------------------------------------

    def launches(self, op: ops.Op) -> Iterator[Launch]:
        """The launches of one fused op."""
        c, h = self.config, self.config.hidden_size
        if isinstance(op, ops.EmbedNorm):
            tied = c.tie_word_embeddings
            width = divisor(self.tiles.of("embed_norm")[0].tile["BN"], h)
            table = operand(self.tensors["lm_head" if tied else "embed"])
            yield self.simple(
                "embed_norm", op.kind, -1,
                {"H": h, "IN_TILES": tied, "BN": width, **table.constants},
                (Axis("T"), Axis("1", 1, h // width), _ONE), **table.bind("table"),
                norm=self.weight("layers.0.attn_norm"),
            )  # fmt: skip
        elif isinstance(op, ops.NormQkvRopeKv):
            yield from self.qkv(op)
        elif isinstance(op, ops.Attention):
            yield self.attention(op)
        elif isinstance(op, ops.NormGateUpAct):
            at, ffn = f"layers.{op.layer}", -(-c.intermediate_size // 64) * 64
            bias = op.gate_bias or op.up_bias
            yield from self.gemm(
                "norm_gate_up_act", op.kind, op.layer, ffn, h, 2,
                {"F": ffn, "H": h, "EPS": op.eps, "HAS_BIAS": bias is not None},
                self.matrix(f"{at}.gate_up"), bias=self.weight(f"{at}.gate_up_bias", bias),
            )  # fmt: skip
        elif isinstance(op, ops.OResidual | ops.DownResidual):
            yield from self.residual(op)
        elif isinstance(op, ops.NormLmHeadSample):
            yield from self.head(op)
        else:
            raise CompileError(f"op {op.kind} has no GPU kernel; this is a fault of SinterLM")

    def qkv(self, op: ops.NormQkvRopeKv) -> Iterator[Launch]:
        """q, k and v; BN is half a head where the heads' norm needs all of one."""
        dim, h, at = op.head_dim, self.config.hidden_size, f"layers.{op.layer}"
        group = op.num_heads // op.num_kv_heads
        bias = op.q_bias or op.k_bias or op.v_bias
        constants = {
            "H": h, "HKV": op.num_kv_heads, "GROUP": group, "D": dim, "EPS": op.eps,
            "QK_EPS": op.qk_eps, "HAS_BIAS": bias is not None, "QK_NORM": op.q_norm is not None,
            "KV_FP8": self.kv_fp8, "KV_ROUNDING": self.device.rounding,
        }  # fmt: skip
        k_scale, v_scale = kv_scales(self.plan.graph, op.layer, self.kv_fp8)
        return self.gemm(
            "norm_qkv_rope_kv", op.kind, op.layer, op.num_kv_heads * (group + 2) * dim // 2, h, 2,
            constants, self.matrix(f"{at}.qkv"), dim // 2, op.q_norm is not None,
            bias=self.weight(f"{at}.qkv_bias", bias),
            q_norm=self.weight(f"{at}.q_norm", op.q_norm),
            k_norm=self.weight(f"{at}.k_norm", op.k_norm),
            k_base=f"k:{op.layer}", v_base=f"v:{op.layer}",
            k_inverse=number(1 / k_scale), v_inverse=number(1 / v_scale),
        )  # fmt: skip

    def residual(self, op: ops.OResidual | ops.DownResidual) -> Iterator[Launch]:
        """A projection back to the stream."""
        is_down, layer, h = isinstance(op, ops.DownResidual), op.layer, self.config.hidden_size
        name = f"layers.{layer}.{'down' if is_down else 'o'}"
        depth = self.tensors[name].k
        norm = f"layers.{layer}.mlp_norm"
        if is_down:
            last = layer == self.config.num_layers - 1
            norm = "final_norm" if last else f"layers.{layer + 1}.attn_norm"
        constants = {"N": h, "K": depth, "A_PITCH": depth, "HAS_BIAS": op.bias is not None}
        return self.gemm(
            "residual_matmul", op.kind, layer, h, depth, 1, constants, self.matrix(name),
            a=f"buffer:{'h' if is_down else 'y'}", bias=self.weight(f"{name}_bias", op.bias),
            norm=self.weight(norm),
        )  # fmt: skip

    def attention(self, op: ops.Attention) -> Launch:
        """Kernels for steps of one token each, by the number of sequences where the table has it
        so, and one for any; layers of one window share them."""
        slot = f"{op.kind}.window{op.window}" if op.window else op.kind
        shape = {
            "HKV": op.num_kv_heads, "GROUP": op.num_heads // op.num_kv_heads, "D": op.head_dim,
            "SCALE": op.scale, "WINDOW": op.window, "KV_FP8": self.kv_fp8, "SEQS": MAX_SEQS,
        }  # fmt: skip
        for which, is_decode in (("attention_decode", True), ("attention", False)):
            wanted = {**shape, "DECODE": is_decode}
            for entry in self.tiles.of(which, made_for=wanted):
                self.attend(slot, op.layer, entry, wanted)
        has_parts = any(name == "part_o" for name, _ in self.scratch)
        k_scale, v_scale = kv_scales(self.plan.graph, op.layer, self.kv_fp8)
        bound = {"k_base": f"k:{op.layer}", "v_base": f"v:{op.layer}",
                 "k_scale": number(k_scale), "v_scale": number(v_scale),
                 "counters": "buffer:attention_counters"}  # fmt: skip
        if not has_parts:
            bound |= dict.fromkeys(("part_o", "part_ml", "counters"), "null")
        return Launch(slot, op.layer, self.bind("attention", bound))

    def attend(self, slot: str, layer: int, entry: Entry, shape: dict[str, Any]) -> None:
        """Offer the kernel of ``entry``, and see to what it leaves between ranges of keys."""
        group, dim, heads = (int(shape[name]) for name in ("GROUP", "D", "HKV"))
        is_decode, segments = bool(shape["DECODE"]), entry.tile["SEGMENTS"]
        rows = max(entry.tile["BM"], 1 << (group - 1).bit_length())
        keys, options = keys_of_tile(entry, self.device, self.kv_fp8, dim, is_decode,
                                     shape["WINDOW"] > 0)  # fmt: skip
        constants = {**shape, "BM": rows, "TILE": keys, "SEGMENTS": segments,
                     "DRAIN": self.device.drain if segments > 1 else ""}  # fmt: skip
        blocks = Axis("S") if is_decode else Axis("T", rows // group, 1, True)
        if segments > 1:
            assert is_decode, "ranges of keys are sized per sequence"
            self.need("part_o", "S", heads * segments * rows * 4 * dim)
            self.need("part_ml", "S", heads * segments * rows * 4 * 2)
            self.need("attention_counters", "S", heads * 4)
        taken = Entry(entry.kernel, entry.max_rows, {}, options, entry.source)
        grid = (blocks, Axis("1", 1, heads), Axis("1", 1, segments))
        kind = "decode" if is_decode else "any"
        self.choose(slot, layer, "attention", taken, constants, grid, "S", kind)

    def head(self, op: ops.NormLmHeadSample) -> Iterator[Launch]:
        """Hidden states for whoever wants them, logits with the best of each block of them, and
        the merge."""
        c, h = self.config, self.config.hidden_size
        columns = divisor(self.tiles.of("final_norm")[0].tile["BN"], h)
        yield self.simple(
            "final_norm", "final_norm", -1, {"H": h, "EPS": op.eps, "BN": columns},
            (Axis("N"), Axis("1", 1, h // columns), _ONE), norm=self.weight("final_norm"),
        )  # fmt: skip
        padded = -(-c.vocab_size // 64) * 64
        matrix = self.matrix("lm_head")
        shape = {"H": h, "V": c.vocab_size, "VP": padded, "EPS": op.eps, "KEEP_LOGITS": True,
                 **matrix.constants}  # fmt: skip
        entries = self.tiles.of("lm_head", matrix.stored, shape)
        widths = {cut_gemm(e, padded, h)["BN"] for e in entries}
        width = min(widths)  # one for all, so that one merge serves them
        blocks = padded // width
        for entry in entries:
            tile = cut_gemm(entry, padded, h, width, most_depth=matrix.deepest)
            constants = {**shape, **self.gemm_constants(tile, entry)}
            del constants["SPLIT"], constants["DRAIN"]
            self.choose(op.kind, -1, "lm_head", entry, constants,
                        (Axis("R", tile["BM"], blocks), _ONE, _ONE), "R")  # fmt: skip
        for name, count in (("best", 3), ("tops", 1), ("best_ids", 1)):
            self.need(name, "R", count * blocks * 4)
        self.need("ids", "R", 4)
        self.need("logprobs", "R", 4)
        yield Launch(op.kind, -1, self.bind("lm_head", matrix.bind()))
        wide = 1 << (blocks - 1).bit_length()
        yield self.simple("merge_rows", "merge_rows", -1, {"BLOCKS": blocks, "WIDTH": wide},
                          (Axis("R"), _ONE, _ONE), slots="input:row_slots")  # fmt: skip

    # -- kernels ---------------------------------------------------------------------------------

    def gemm(
        self, name: str, slot: str, layer: int, columns: int, depth: int, halves: int,
        constants: dict[str, Any], matrix: Operand, most_columns: int = 1 << 30,
        must_be_most: bool = False, **bound: str,
    ) -> Iterator[Launch]:  # fmt: skip
        """A GEMM by every entry of the tile table for what ``matrix`` is stored in; in two launches
        from LEAST_ROWS rows on where it lies as a vendor's library wants it."""
        slot += matrix.suffix
        has_vendor = matrix.stored == "bf16" and matrix.constants["W_PITCH"] > 0
        shape = {**constants, **matrix.constants}
        for entry in self.tiles.of(name, matrix.stored, shape):
            tile = cut_gemm(entry, columns, depth, most_columns, must_be_most, matrix.deepest)
            if matrix.stored == "fp8-a8" and tile["BK"] != matrix.deepest:
                raise CompileError(
                    f"the tile of {name} ({entry.source}) has BK {tile['BK']}, and a scale of "
                    f"activations covers {matrix.deepest}; this is a fault of SinterLM's table"
                )
            tiles_n, split = columns // tile["BN"], tile["SPLIT"]
            if split > 1:
                count = -(-entry.max_rows // tile["BM"]) * tiles_n
                self.need("parts", "1", count * split * halves * tile["BM"] * tile["BN"] * 4)
                self.need("counters", "1", count * 4)
            grid = (Axis("T", tile["BM"], tiles_n * split), _ONE, _ONE)
            made = {**shape, **self.gemm_constants(tile, entry)}
            most = entry.max_rows or (vendor.LEAST_ROWS - 1 if has_vendor else 0)
            self.choose(slot, layer, name, entry, made, grid, "T", most=most)
        yield Launch(slot, layer, self.bind(name, {**bound, **matrix.bind()}))
        if has_vendor:
            self.leave_out(slot, 0)
            yield from self.product(
                name, slot, layer, -(-columns * halves // 64) * 64, depth, matrix, constants, bound
            )

    def product(
        self, name: str, slot: str, layer: int, columns: int, depth: int, matrix: Operand,
        constants: dict[str, Any], bound: dict[str, str],
    ) -> Iterator[Launch]:  # fmt: skip
        """The GEMM ``name`` by the vendor's library, then its epilogue."""
        self.need("sums", "T", 4 * columns)
        self.need("vendor_workspace", "1", vendor.WORKSPACE_BYTES)
        shape = {"N": columns, "K": depth, "W_PITCH": matrix.constants["W_PITCH"]}
        gemm = vendor.VENDOR_GEMM
        which, grid = f"{slot}.product", (Axis("T", vendor.ROWS_STEP), _ONE, _ONE)
        self.leave_out(which, vendor.LEAST_ROWS - 1)
        entry = Entry(gemm, 0, {}, {}, "the vendor's choice")
        self.choose(which, layer, gemm, entry, shape, grid, "T")
        operands = {"a": bound.get("a", "buffer:xw"), "w": matrix.args[0]}
        yield Launch(which, layer, self.bind(gemm, operands))
        epilogue, which = vendor.EPILOGUES[name], f"{slot}.epilogue"
        (entry,) = self.tiles.of(epilogue)
        made = {n: value for n, value in constants.items() if n not in _PRODUCT_CONSTANTS}
        if name == "norm_qkv_rope_kv":  # a program has a head
            made |= {"N": columns, "BN": constants["D"] // 2}
            blocks = constants["HKV"] * (constants["GROUP"] + 2)
        else:
            width = made.get("F", columns)
            made["BN"] = divisor(entry.tile["BN"], width)
            blocks = width // made["BN"]
        # More rows where there are fewer columns: each thread loads 16 bytes.
        made["BM"] = max(entry.tile["BM"] * entry.tile["BN"] // made["BN"], 1)
        self.leave_out(which, vendor.LEAST_ROWS - 1)
        grid = (Axis("T", made["BM"], blocks), _ONE, _ONE)
        self.choose(which, layer, epilogue, entry, made, grid, "T")
        args = SIGNATURES[epilogue].args
        yield Launch(which, layer, self.bind(epilogue, {n: a for n, a in bound.items()
                                                        if n in args}))  # fmt: skip

    def gemm_constants(self, tile: dict[str, int], entry: Entry) -> dict[str, Any]:
        """Constants that all GEMMs have. Weights that are read once go past the nearest cache."""
        return {
            **tile, "NUM_XCD": self.device.dies, "CACHE": ".cg" if 0 < entry.max_rows <= 16 else "",
            "DRAIN": self.device.drain if tile["SPLIT"] > 1 else "",
        }  # fmt: skip

    def simple(
        self, name: str, slot: str, layer: int, constants: dict[str, Any],
        grid: tuple[Axis, Axis, Axis], **bound: str,
    ) -> Launch:  # fmt: skip
        """A kernel that has one form."""
        self.choose(slot, layer, name, self.tiles.of(name)[0], constants, grid, "T")
        return Launch(slot, layer, self.bind(name, bound))

    def choose(
        self, slot: str, layer: int, name: str, entry: Entry, constants: dict[str, Any],
        grid: tuple[Axis, Axis, Axis], unit: Unit, kind: Any = "any", most: int | None = None,
    ) -> None:  # fmt: skip
        """Offer a kernel for a slot, for steps of ``most`` units (None = the entry's); layers that
        share a slot must offer the same ones."""
        most = entry.max_rows if most is None else most
        same = next((k for k in self.kernels if (k.name, k.constants, k.options, k.grid)
                     == (name, constants, entry.options, grid)), None)  # fmt: skip
        if same is None:
            made = len(self.kernels)
            same = Kernel(made, name, grid, constants, entry.options, entry.source)
            self.kernels.append(same)
        choice = Choice(slot, unit, most, kind, same.id)
        if choice not in self.choices:
            if any((c.slot, c.most, c.kind) == (slot, most, kind) for c in self.choices):
                raise CompileError(
                    f"layer {layer} needs another {name} than the layers before; this is a fault "
                    "of SinterLM"
                )
            self.choices.append(choice)

    def leave_out(self, slot: str, most: int) -> None:
        """Steps of at most ``most`` tokens (0 = any number) have no launch for a slot."""
        choice = Choice(slot, "T", most, "any", LEFT_OUT)
        if choice not in self.choices:
            self.choices.append(choice)

    def bind(self, name: str, bound: dict[str, str]) -> tuple[str, ...]:
        """What fills each argument: ``bound``, or what its name says."""
        args = SIGNATURES[name].args
        assert set(bound) <= set(args), f"{name} has no {set(bound) - set(args)}"
        return tuple(bound.get(arg) or self.default(arg, kind) for arg, kind in args.items())

    def default(self, arg: str, kind: str) -> str:
        """A scalar, a step's input or a buffer, by the argument's name."""
        if not kind.startswith("*"):
            return f"value:{arg}"
        if arg in INPUTS:
            return f"input:{arg}"
        is_scratch = any(name == arg for name, _ in self.scratch)
        if arg in ("parts", "counters") and not is_scratch:
            return "null"
        return f"buffer:{arg}"

    def weight(self, tensor: str, source: str | None = "") -> str:
        """A packed tensor; ``null`` where the model has none (``source`` None)."""
        return "null" if source is None else f"weight:{self.tensors[tensor].offset}"

    def matrix(self, tensor: str) -> Operand:
        """How a GEMM reads a packed matrix."""
        return operand(self.tensors[tensor], self.device.rounding)

    def need(self, name: str, unit: Unit, nbytes: int) -> None:
        """Scratch memory, as large as the largest that asks."""
        self.scratch[name, unit] = max(self.scratch.get((name, unit), 0), nbytes)


#: What a step brings, and what stays on the device between steps, with the unit each is sized by.
INPUTS: dict[str, str] = {
    "tokens": "T", "positions": "T", "slots": "T", "kv_slots": "T", "page_table": "S",
    "query_start": "S", "context_lens": "S", "rows": "R", "row_slots": "R", "temperature": "R",
    "seeds": "R", "draws": "R", "cos": "position", "sin": "position", "drawn": "slot",
}  # fmt: skip
