"""Writes a packed weights file as a stream: bounded memory, one running SHA-256."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from sinterlm.artifact.manifest import FileRef

Chunk = tuple[int, bytes | bytearray | memoryview]

_ZEROS = bytes(1 << 20)


def write_weights(
    path: Path, chunks: Iterable[Chunk], nbytes: int, advance: Callable[[int], None]
) -> FileRef:
    """Write ``(offset, buffer)`` chunks, ascending and disjoint, to a file of ``nbytes``.

    Gaps become zeros. ``advance`` is called with the bytes written. Raises OSError; chunks out of
    order or past the end are our own bug.
    """
    total = hashlib.sha256()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
    with os.fdopen(fd, "wb") as file:
        for piece in _gapless(chunks, nbytes):
            file.write(piece)
            total.update(piece)
            advance(len(piece))
    return FileRef(path.name, nbytes, total.hexdigest())


def _gapless(chunks: Iterable[Chunk], nbytes: int) -> Iterator[memoryview]:
    """The same bytes with zeros between chunks and after the last."""
    at = 0
    for offset, buffer in chunks:
        piece = memoryview(buffer).cast("B")
        assert at <= offset and offset + len(piece) <= nbytes, "packed chunks overlap or overrun"
        yield from _zeros(offset - at)
        yield piece
        at = offset + len(piece)
    yield from _zeros(nbytes - at)


def _zeros(count: int) -> Iterator[memoryview]:
    while count > 0:
        piece = memoryview(_ZEROS)[:count]
        yield piece
        count -= len(piece)
