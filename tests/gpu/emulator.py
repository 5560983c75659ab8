"""Runs code objects of gfx942 on tinygrad's emulator of AMD's instructions: a checkout of tinygrad
(https://github.com/tinygrad/tinygrad) named by TINYGRAD_PATH, which needs clang.

What a loader and a command processor do is done here: segments copied, hidden arguments filled in,
registers set up as the kernel descriptor asks (LLVM's AMDGPU user guide, code object V5).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from tests.gpu.code_objects import sections
from tests.gpu.emulator_fixes import correct


def load_emulator() -> Any:
    """tinygrad's ``emu`` module. Raises LookupError where TINYGRAD_PATH does not lead to it."""
    path = os.environ.get("TINYGRAD_PATH", "")
    if not path or not (Path(path) / "test/mockgpu/amd/emu.py").is_file():
        raise LookupError(
            "TINYGRAD_PATH names no checkout of tinygrad with test/mockgpu/amd/emu.py"
        )
    if path not in sys.path:
        sys.path.insert(0, path)
        for name in [n for n in sys.modules if n == "test" or n.startswith("test.")]:
            del sys.modules[name]  # Python's own package of that name
    import test.mockgpu.amd.emu as emu

    correct(emu)
    return emu


@dataclass
class Loaded:
    """A code object in memory."""

    memory: mmap.mmap
    entry: int  #: address of the first instruction
    size: int
    rsrc2: int
    user_sgprs: list[tuple[str, int]]  #: what the first scalar registers hold, with their number
    args: list[dict[str, Any]]
    kernarg_bytes: int


def load_object(image: bytes) -> Loaded:
    """Copy the segments of ``image`` and read its kernel descriptor."""
    (phoff,) = struct.unpack_from("<Q", image, 32)
    phentsize, phnum = struct.unpack_from("<HH", image, 54)
    segments = [struct.unpack_from("<IIQQQQQQ", image, phoff + i * phentsize) for i in range(phnum)]
    loads = [s for s in segments if s[0] == 1]
    size = max(s[3] + s[6] for s in loads) + 4096
    memory = mmap.mmap(-1, size)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for _, _, offset, address, _, filesz, *_ in loads:
        memory[address : address + filesz] = image[offset : offset + filesz]
    found = sections(image)
    names, symbols = found[".dynstr"], found[".dynsym"]
    places = {}
    for i in range(0, len(symbols), 24):
        name, _, _, _, value, _ = struct.unpack_from("<IBBHQQ", symbols, i)
        places[names[name : names.index(0, name)].decode()] = value
    (descriptor,) = (value for name, value in places.items() if name.endswith(".kd"))
    (entry,) = struct.unpack_from("<q", memory, descriptor + 16)
    _, rsrc2 = struct.unpack_from("<II", memory, descriptor + 48)
    (properties,) = struct.unpack_from("<H", memory, descriptor + 56)
    kinds = (("private_segment_buffer", 4), ("dispatch_ptr", 2), ("queue_ptr", 2), ("kernarg", 2),
             ("dispatch_id", 2), ("flat_scratch", 2), ("private_segment_size", 1))  # fmt: skip
    user = [kind for bit, kind in enumerate(kinds) if properties >> bit & 1]
    note = found[".note"]
    name_size, note_size, _ = struct.unpack_from("<III", note)
    start = 12 + -(-name_size // 4) * 4
    (kernel,) = msgspec.msgpack.decode(note[start : start + note_size])["amdhsa.kernels"]
    return Loaded(memory, base + descriptor + entry, size, rsrc2, user, kernel[".args"],
                  kernel[".kernarg_segment_size"])  # fmt: skip


def run_object(
    image: bytes, grid: Sequence[int], threads: int, shared: int, values: Sequence[int]
) -> None:
    """Run every program of ``grid``; ``values`` are the arguments that are not hidden."""
    emu = load_emulator()
    loaded = load_object(image)
    block = ctypes.create_string_buffer(max(loaded.kernarg_bytes, 16) + 16)
    at = ctypes.addressof(block)
    at += -at % 16
    given = iter(values)
    hidden = {f"hidden_block_count_{axis}": n for axis, n in zip("xyz", grid, strict=True)}
    hidden |= {f"hidden_group_size_{axis}": n for axis, n in zip("xyz", (threads, 1, 1),
                                                                 strict=True)}  # fmt: skip
    for arg in loaded.args:
        kind = arg[".value_kind"]
        value = hidden.get(kind, 0) if kind.startswith("hidden_") else next(given)
        raw = (value & (1 << 8 * arg[".size"]) - 1).to_bytes(arg[".size"], "little")
        ctypes.memmove(at + arg[".offset"], raw, arg[".size"])
    registers: list[int] = []
    for kind, count in loaded.user_sgprs:
        held = [at & 0xFFFFFFFF, at >> 32] if kind == "kernarg" else [0] * count
        registers += held
    lds = -(-shared // 512) << 15  # GRANULATED_LDS_SIZE, in units of 512 bytes
    rsrc2 = loaded.rsrc2 & ~(0x1FF << 15) | lds
    emu.run_asm(loaded.entry, loaded.size, *grid, threads, 1, 1, at, rsrc2, 0, "cdna", registers)
