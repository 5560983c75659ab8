"""What tinygrad's emulator of CDNA does not do, or does otherwise than the ISA document says, put
right from outside (seen at commit a9069c17 of 2026-08-22):

- instructions that only write back or drop caches, or set bits of the mode register, are unknown:
  they do nothing here;
- an atomic that returns the old value is told by ``sc0``, which older chips call ``glc``;
- loads and stores of 1 and 2 bytes through a buffer descriptor take whole words;
- lanes are run one after the other, so an instruction that reads other lanes of the register that
  it writes (DPP, ds_permute, ds_bpermute) reads what it has just written;
- row_bcast takes a row's first lane instead of the last one of the row, or the two rows, before;
- fp8 numbers are those of CDNA 4 (e4m3fn), where CDNA 3 has e4m3fnuz, and what is too large for one
  becomes the largest, as Triton sets the mode (FP16_OVFL);
- the instruction that widens two fp8 numbers writes two registers, which is not foreseen.
"""

from __future__ import annotations

import ctypes
import struct
from types import SimpleNamespace
from typing import Any

_IGNORED = ("BUFFER_INV", "BUFFER_WBL2", "GLOBAL_INV", "GLOBAL_WB", "S_SETREG_IMM32_B32")
_NOP = struct.pack("<II", 0xBF800000, 0)  # s_nop 0
#: A vector register that no kernel of ours uses: copies of what is read across lanes.
_SPARE = 255
_LANES, _WORD = 64, 4


def correct(emu: Any) -> None:
    """Change the module ``emu``, once."""
    if getattr(emu, "corrected", False):
        return
    emu.corrected = True
    iattr, get_runner, decode_at = emu._iattr, emu._get_runner, emu._decode_at

    def attribute(inst: Any, name: str, default: int = 0) -> int:
        is_return = name == "glc" and hasattr(type(inst), "sc0")
        found: int = iattr(inst, "sc0" if is_return else name, default)
        return found

    def runner(code: bytes, arch: str) -> Any:
        is_ignored = emu._op_name(emu.decode_inst(code, arch)).startswith(_IGNORED)
        return get_runner(_NOP if is_ignored else code, arch)

    def decode(pc: int, arch: str) -> Any:
        made, inst = decode_at(pc, arch)
        if emu._op_name(inst).startswith(_IGNORED):
            skip = SimpleNamespace(fxn=_skipper(inst.size()))
            return (SimpleNamespace(arg=SimpleNamespace(globals=[0])), skip), inst
        place = _read_across(emu, inst)
        if place is None:
            return made, inst
        byte = ctypes.c_uint8.from_address(pc + place)  # the fields are read from there each time
        source, byte.value = byte.value, _SPARE
        (program, runtime) = made
        used = list(program.arg.globals)

        def copy_and_run(registers: Any, *rest: Any) -> None:
            size = _LANES * _WORD
            ctypes.memmove(registers.value + _SPARE * size, registers.value + source * size, size)
            runtime.fxn(*rest)

        arg = SimpleNamespace(globals=[_VECTORS, *used])
        return (SimpleNamespace(arg=arg), SimpleNamespace(fxn=copy_and_run)), inst

    emu._iattr, emu._get_runner, emu._decode_at = attribute, runner, decode
    _broadcast_rows(emu)
    _narrow_buffer_ops(emu)
    _fp8_of_cdna3(emu)


def _fp8_of_cdna3(emu: Any) -> None:
    """To and from e4m3fnuz, to nearest even; NaN of NaN and infinity."""
    from tinygrad.dtype import dtypes
    from tinygrad.uop.ops import UOp

    def const(value: int) -> Any:
        return UOp.const(value, dtypes.uint32)

    def number(value: float) -> Any:
        return UOp.const(value, dtypes.float32)

    def widen(v: Any) -> Any:
        code = v.cast(dtypes.uint32) & const(0xFF)
        exponent, mantissa = (code >> const(3)) & const(15), code & const(7)
        normal = ((exponent + const(119)) << const(23)) | (mantissa << const(20))
        small = (mantissa.cast(dtypes.float32) * number(2.0**-10)).bitcast(dtypes.uint32)
        bits = exponent.eq(const(0)).where(small, normal) | ((code >> const(7)) << const(31))
        return code.eq(const(0x80)).where(const(0x7FC00000), bits).bitcast(dtypes.float32)

    def narrow(v: Any) -> Any:
        bits = (v if v.dtype == dtypes.float32 else v.bitcast(dtypes.float32)).bitcast(
            dtypes.uint32
        )
        size = bits & const(0x7FFFFFFF)
        even = size + const(0x7FFFF) + ((size >> const(20)) & const(1))
        steps = (size.bitcast(dtypes.float32) + number(2.0**13)).bitcast(dtypes.uint32)
        small = steps - const((13 + 127) << 23)
        is_small = size.__lt__(const(120 << 23))
        code = is_small.where(small, (even >> const(20)) - const(119 << 3))
        code = code.__lt__(const(0x80)).where(code, const(0x7F))
        signed = code.eq(const(0)).where(code, code | ((bits >> const(31)) << const(7)))
        return size.__lt__(const(0x7F800000)).where(signed, const(0x80)).cast(dtypes.uint8)

    emu._FUNCS["fp8_to_f32"], emu._FUNCS["f32_to_fp8"] = widen, narrow
    for kind in (emu.irc.VOP1, emu.irc.VOP1_SDWA):
        emu._INST_HANDLERS[kind] = _two_from_fp8(emu, widen, emu._INST_HANDLERS[kind])


def _two_from_fp8(emu: Any, widen: Any, others: Any) -> Any:
    """V_CVT_PK_F32_FP8: the two low bytes of a register, or of the half that SDWA selects."""
    from tinygrad.dtype import dtypes
    from tinygrad.uop.ops import UOp

    const = emu._c

    def handler(inst: Any, ctx: Any) -> Any:
        if not emu._op_name(inst).startswith("V_CVT_PK_F32_FP8"):
            return others(inst, ctx)
        kind, lane, mask = type(inst), ctx.range(), ctx.rexec()
        if hasattr(kind, "src0_sel"):
            register = ctx.rvgpr_dyn(ctx.inst_field(kind.vsrc0), lane)
            half = emu._sdwa_select(register, ctx.inst_field(kind.src0_sel), const(0))
        else:
            half = ctx.rvgpr_dyn(ctx.inst_field(kind.src0) - const(256), lane)
        at = ctx.inst_field(kind.vdst)
        pair = [widen(half >> const(8 * i)).bitcast(dtypes.uint32) for i in range(2)]
        stores = [ctx.wvgpr_dyn(at + const(i), lane, x, mask) for i, x in enumerate(pair)]
        return UOp.sink(UOp.group(*stores).end(lane), *ctx.inc_pc())

    return handler


def _broadcast_rows(emu: Any) -> None:
    """row_bcast:15 and row_bcast:31 of the ISA document."""
    kept, const = emu._dpp16_ctrl, emu._c
    from tinygrad.dtype import dtypes

    def control(lane: Any, dpp: int, row_mask: int, bank_mask: int, wave_size: int) -> Any:
        found = kept(lane, dpp, row_mask, bank_mask, wave_size)
        name, last = emu.decode_dpp16(dpp)
        if name != "row_bcast":
            return found
        rows = lane.cast(dtypes.int) // const(last + 1, dtypes.int)
        source = rows * const(last + 1, dtypes.int) - const(1, dtypes.int)
        return source, found[1], source >= const(0, dtypes.int)

    emu._dpp16_ctrl = control


#: Where the emulator passes the vector registers among its buffers.
_VECTORS = 1


def _skipper(size: int) -> Any:
    """Moves the program counter, which the emulator keeps behind the scalar registers."""

    def skip(scalars: Any) -> None:
        at = ctypes.c_uint64.from_address(scalars.value + 256 * _WORD)
        at.value += size

    return skip


def _read_across(emu: Any, inst: Any) -> int | None:
    """The byte of the encoding with the register that is read across lanes, where it is also
    written; None otherwise."""
    if hasattr(type(inst), "dpp"):
        return 4 if inst.vsrc0.offset == inst.vdst.offset else None
    if "PERMUTE_B32" in emu._op_name(inst) and emu._op_name(inst).startswith("DS_"):
        return 5 if inst.data0.offset == inst.vdst.offset else None
    return None


def _narrow_buffer_ops(emu: Any) -> None:
    """Loads and stores of less than 4 bytes through a buffer descriptor, which the emulator takes
    for whole words: base + scalar offset + lane's offset + immediate, zero beyond num_records."""
    from tinygrad.dtype import dtypes
    from tinygrad.uop.ops import UOp

    whole = emu._INST_HANDLERS[emu.irc.MUBUF]
    const = emu._c

    def handler(inst: Any, ctx: Any) -> Any:
        name = emu._op_name(inst)
        bits = 16 if "SHORT" in name else 8 if "BYTE" in name else 32
        if bits == 32 or "FORMAT" in name:
            return whole(inst, ctx)
        kind = type(inst)
        data, at = ctx.inst_field(kind.vdata), ctx.inst_field(kind.vaddr)
        descriptor = ctx.inst_field(kind.srsrc) * const(4)
        scalar, offset = ctx.inst_field(kind.soffset), ctx.inst_field(kind.offset)
        offen = ctx.inst_field(kind.offen)
        base = emu._u64(ctx.rsgpr_dyn(descriptor), ctx.rsgpr_dyn(descriptor + const(1)))
        base = base & UOp.const(0xFFFFFFFFFFFF, dtypes.uint64)
        lane = ctx.range()
        active = emu._lane_active(ctx.rexec(), lane)
        moved = (scalar < const(128)).where(ctx.rsgpr_dyn(scalar), scalar - const(128))
        own = offen.ne(const(0)).where(ctx.rvgpr_dyn(at, lane), const(0)) + offset
        inside = active & own.__lt__(ctx.rsgpr_dyn(descriptor + const(2)))
        address = base + moved.cast(dtypes.uint64) + own.cast(dtypes.uint64)
        address = inside.where(address, UOp.const(0, dtypes.uint64))
        shift = (address.cast(dtypes.uint32) & const(3)) * const(8)
        ones = const((1 << bits) - 1)
        word = ctx.vmem.index(
            (address >> UOp.const(2, dtypes.uint64)).cast(dtypes.int64).valid(inside)
        )
        high = name.endswith("_HI")
        if "STORE" in name:
            value = ctx.rvgpr_dyn(data, lane) >> const(16 if high else 0) & ones
            keep = (ones << shift) ^ const(0xFFFFFFFF)
            stores = [word.store(inside.where((word & keep) | (value << shift), word))]
        else:
            value = inside.where((word.load() >> shift) & ones, const(0))
            if "D16" in name:
                old = ctx.rvgpr_dyn(data, lane)
                value = (old & const(0xFFFF)) | (value << const(16)) if high else (
                    (old & const(0xFFFF0000)) | value)  # fmt: skip
            stores = [ctx.wvgpr_dyn(data, lane, value, ctx.rexec())]
        return UOp.sink(UOp.group(*stores).end(lane), *ctx.inc_pc())

    emu._INST_HANDLERS[emu.irc.MUBUF] = handler
