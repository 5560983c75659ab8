"""The library of a GPU bundle: the host, one file for every model, and behind it the launch table
with the code objects of one model (``objects.archive``), which the host finds in its own file.

    <shared library>  <padding>  <archive>  OFFSET of the archive, 8 bytes  a name, 24 bytes
"""

from __future__ import annotations

import base64
import hashlib
import struct
import tempfile
from pathlib import Path

from sinterlm.artifact.memo import Memo, digest_json
from sinterlm.backends.cxx import toolchain
from sinterlm.backends.cxx.toolchain import Compiler

_HOST = Path(__file__).with_name("host")
_NAME = b"sinterlm-launch-table"
_TRAILER = struct.Struct("<q24s")
_ALIGN = 64  #: of the code objects within the file


def host_sha256() -> str:
    """Hex SHA-256 over the host's sources and the headers that it shares with CPUs."""
    total = hashlib.sha256(toolchain.headers_sha256().encode())
    for path in sorted(_HOST.iterdir()):
        total.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return total.hexdigest()


def compile_host(
    out: Path, compiler: Compiler | None = None, defines: dict[str, str] | None = None
) -> None:
    """Compile the host into ``out``; ``defines`` are for tests. Raises CompileError."""
    source = (_HOST / "host.cpp").read_text(encoding="utf-8")
    flags = (f"-I{_HOST}", "-ldl")
    toolchain.compile_library(source, out, "generic", compiler, defines, flags)


def host_library(memo: Memo) -> bytes:
    """The host, compiled once per compiler and version of its sources. Raises CompileError."""
    compiler = toolchain.find_compiler(memo=memo)
    flags = toolchain.flags_for("generic", compiler)
    key = digest_json(["gpu host", host_sha256(), compiler.identity, flags])
    fact = memo.recall("hosts", key)
    if fact is not None:
        return base64.b64decode(fact["library"])
    with tempfile.TemporaryDirectory(prefix="sinterlm-host-") as folder:
        out = Path(folder) / "host.so"
        compile_host(out, compiler)
        made = out.read_bytes()
    memo.remember("hosts", key, {"library": base64.b64encode(made).decode()})
    return made


def join(host: bytes, archive: bytes) -> bytes:
    """One file of both, in which the code objects of ``archive`` are aligned."""
    body = archive.index(b"\nend\n") + len(b"\nend\n")
    offset = len(host) + -(len(host) + body) % _ALIGN
    return host.ljust(offset, b"\0") + archive + _TRAILER.pack(offset, _NAME)


def archive_of(library: bytes) -> bytes:
    """Inverse of ``join``. Raises ValueError for a file that is none."""
    if len(library) > _TRAILER.size:
        offset, name = _TRAILER.unpack(library[-_TRAILER.size :])
        if name.rstrip(b"\0") == _NAME and 0 < offset < len(library):
            return library[offset : -_TRAILER.size]
    raise ValueError("it is no library for a GPU: there is no launch table behind it")
