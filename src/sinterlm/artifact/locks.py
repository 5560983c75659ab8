"""File locks between processes: one writer per cache entry, or many readers.

The kernel drops a lock with its holder, however it dies. Lock files may be deleted by whoever
holds them exclusively; a lock on a deleted file is noticed and taken again on the new one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

#: File systems without locks: renames keep readers safe, and work may be done twice.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def _open_and_lock(path: Path, mode: int, wait: Callable[[], None] | None) -> int | None:
    """A descriptor that holds the lock; None when it is taken and we must not wait."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(fd, mode | fcntl.LOCK_NB)
            except OSError as exc:
                if exc.errno in _NO_LOCKS:
                    return fd
                if exc.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                if wait is None:
                    os.close(fd)
                    return None
                wait()
                fcntl.flock(fd, mode)
            if _is_current(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _is_current(fd: int, path: Path) -> bool:
    """Whether ``path`` still names the file behind ``fd``."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def exclusive(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold ``path`` alone; calls ``on_wait`` once before waiting for others. Raises OSError."""
    fd = _open_and_lock(path, fcntl.LOCK_EX, on_wait)
    assert fd is not None, "waiting locks are always obtained"
    try:
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def shared(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold ``path`` with other readers, so that nobody prunes what we use. Raises OSError."""
    fd = _open_and_lock(path, fcntl.LOCK_SH, on_wait)
    assert fd is not None, "waiting locks are always obtained"
    try:
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def try_exclusive(path: Path, delete: bool = False) -> Iterator[bool]:
    """Yields whether ``path`` could be held alone at once; deletes it after use if asked to."""
    fd = _open_and_lock(path, fcntl.LOCK_EX, None)
    try:
        yield fd is not None
    finally:
        if fd is not None:
            if delete:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            os.close(fd)
