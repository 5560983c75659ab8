"""Libraries of the tests' own C++, kept in the cache that the tests' models share.

Whichever process asks first compiles one while others wait; the next run finds it there.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sinterlm import __version__
from sinterlm.artifact import strict
from sinterlm.artifact.cache import CODE, Cache
from sinterlm.artifact.keys import CodeEntry, CodeIdentity
from sinterlm.artifact.manifest import ABI_VERSION
from sinterlm.artifact.progress import LogProgress
from sinterlm.artifact.storage import write_file
from sinterlm.backends.cxx.toolchain import (
    compile_library,
    find_compiler,
    flags_for,
    headers_sha256,
)
from sinterlm.options import IsaName

#: ``build_library(source, isa, flags)`` gives the path of the shared library.
BuildLibrary = Callable[..., Path]


def build_into(cache: Cache, source: str, isa: IsaName, flags: Sequence[str] = ()) -> Path:
    """The library of C++ ``source``, found or compiled. The key knows the source, our headers and
    the flags: a source that includes other files would not be compiled again when they change.
    """
    compiler = find_compiler(memo=cache.memo)
    identity = CodeIdentity(
        source_sha256=hashlib.sha256(source.encode()).hexdigest(),
        headers_sha256=headers_sha256(),
        compiler=compiler.identity,
        flags=(*flags_for(isa, compiler), *flags),
        target="cpu",
        isa=isa,
        dtype="",  # the source has all that it needs
        sinterlm_version=__version__,
        abi_version=ABI_VERSION,
    )

    def write(folder: Path) -> None:
        compile_library(source, folder / "built.so", isa, compiler, extra_flags=flags)
        library = write_file(folder / "model.so", (folder / "built.so").read_bytes())
        (folder / "built.so").unlink()
        text = write_file(folder / "model.cpp", source.encode())
        entry = CodeEntry(identity, library, text, "a test", time.time())
        write_file(folder / "code.json", strict.to_json(entry).encode())

    with cache.entry(CODE, identity.key, write, LogProgress()):
        return cache.folder("code", identity.key) / "model.so"
