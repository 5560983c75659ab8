"""What a code object says of itself: the layout of its arguments, and its limits. Read from the ELF
file as a driver would: AMD's metadata note (msgpack; LLVM's AMDGPU user guide), NVIDIA's
``.nv.info`` section (attributes of four bytes and a payload; NVIDIA documents no format, so a field
that is not as expected is an error)."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass

import msgspec


@dataclass(frozen=True)
class Param:
    offset: int
    size: int


@dataclass(frozen=True)
class CodeObject:
    symbol: str
    params: tuple[Param, ...]
    param_bytes: int  #: of the whole argument block
    threads: int  #: of a block
    device: str  #: that it is for, as the vendor spells it


def image_bytes(address: int) -> bytes:
    """The ELF file that begins at ``address``; its section headers stand last."""
    head = ctypes.string_at(address, 64)
    (shoff,) = struct.unpack_from("<Q", head, 40)
    (phoff,) = struct.unpack_from("<Q", head, 32)
    phentsize, phnum, shentsize, shnum = struct.unpack_from("<HHHH", head, 54)
    return ctypes.string_at(address, max(shoff + shentsize * shnum, phoff + phentsize * phnum))


def read_code_object(image: bytes) -> CodeObject:
    assert image.startswith(b"\x7fELF\x02\x01"), "no 64-bit little-endian ELF file"
    (machine,) = struct.unpack_from("<H", image, 18)
    return {224: _amd, 190: _nvidia}[machine](image)


def sections(image: bytes) -> dict[str, bytes]:
    (shoff,) = struct.unpack_from("<Q", image, 40)
    entsize, count, names = struct.unpack_from("<HHH", image, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", image, shoff + i * entsize) for i in range(count)]
    at = headers[names][4]

    def name(offset: int) -> str:
        return image[at + offset : image.index(0, at + offset)].decode()

    return {name(h[0]): image[h[4] : h[4] + (0 if h[1] == 8 else h[5])] for h in headers}


def _amd(image: bytes) -> CodeObject:
    note = sections(image)[".note"]
    name_size, size, kind = struct.unpack_from("<III", note)
    assert kind == 32, "the note is no NT_AMDGPU_METADATA"
    start = 12 + -(-name_size // 4) * 4
    facts = msgspec.msgpack.decode(note[start : start + size])
    (kernel,) = facts["amdhsa.kernels"]
    return CodeObject(
        kernel[".name"],
        tuple(  # hidden ones are the driver's to fill
            Param(a[".offset"], a[".size"])
            for a in kernel[".args"]
            if not a[".value_kind"].startswith("hidden_")
        ),
        kernel[".kernarg_segment_size"],
        kernel[".max_flat_workgroup_size"],
        facts["amdhsa.target"].rpartition("-")[2],
    )


#: Attributes of ``.nv.info``, and the format of those with a payload.
_PARAM_INFO, _PARAM_BYTES, _THREADS, _PAYLOAD = 0x17, 0x19, 0x10, 4


def _nvidia(image: bytes) -> CodeObject:
    found = sections(image)
    (name,) = (n for n in found if n.startswith(".nv.info."))
    info, at = found[name], 0
    params: dict[int, Param] = {}
    param_bytes = threads = 0
    while at < len(info):
        form, attribute, value = struct.unpack_from("<BBH", info, at)
        at += 4
        if form != _PAYLOAD:
            if attribute == _PARAM_BYTES:
                param_bytes = value
            continue
        payload = info[at : at + value]
        at += value
        if attribute == _PARAM_INFO:
            _, ordinal, offset, packed = struct.unpack("<IHHI", payload)
            params[ordinal] = Param(offset, packed >> 18)
        elif attribute == _THREADS:
            threads = struct.unpack_from("<I", payload)[0]
    assert sorted(params) == list(range(len(params))) and params, f"{name}: no parameters"
    flags = struct.unpack_from("<I", image, 48)[0]
    return CodeObject(
        name.removeprefix(".nv.info."), tuple(params[i] for i in sorted(params)), param_bytes,
        threads, f"sm_{flags >> 8 & 0xFF or flags & 0xFF}",
    )  # fmt: skip
