"""Writing folders whole or not at all, and saying plainly why the disk refused.

A folder is prepared under ``tmp/`` on the same file system, synced, and renamed into place. Its
writer holds a lock on it; what a killed writer left has no holder and may be swept away.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from sinterlm.artifact.manifest import FileRef
from sinterlm.errors import BundleError, ResourceError

#: Room left beside what we write, so that the machine is not brought to a full disk.
_SPARE_BYTES = 64 << 20

_MOVE = "move the cache with --cache-dir or SINTERLM_CACHE_DIR"


@contextlib.contextmanager
def disk_errors(where: Path, advice: str = _MOVE) -> Iterator[None]:
    """Turns OSError inside into ResourceError (disk full) or BundleError (not writable)."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"the disk that holds {where} is full ({exc.strerror}); free some space, run "
                f"`sinterlm cache prune`, or {advice}"
            ) from exc
        named = f" {exc.filename}" if exc.filename else ""
        raise BundleError(
            f"cannot write to {where}:{named} {exc.strerror or exc}; {advice}"
        ) from exc


def require_space(where: Path, nbytes: int) -> None:
    """Raises ResourceError unless the disk of ``where`` has room for ``nbytes`` and some spare."""
    with disk_errors(where):
        free = shutil.disk_usage(where).free
    if free < nbytes + _SPARE_BYTES:
        raise ResourceError(
            f"{show_bytes(nbytes)} must be written to {where} and its disk has "
            f"{show_bytes(free)} free; free some space, run `sinterlm cache prune`, or {_MOVE}"
        )


def show_bytes(nbytes: int) -> str:
    """``nbytes`` for people, in decimal units."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 1000)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} bytes"


@contextlib.contextmanager
def staging(root: Path) -> Iterator[Path]:
    """A fresh folder under ``root/tmp``, removed at the end unless it was renamed away."""
    folder, fd = _make_staging(root / "tmp")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(fd)


def _make_staging(parent: Path) -> tuple[Path, int]:
    """Make and lock a folder; again if a sweep took it between the two."""
    parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    while True:
        folder = parent / f"tmp-{os.getpid()}-{secrets.token_hex(6)}"
        os.mkdir(folder, 0o755)
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.exists():
                return folder, fd
            os.close(fd)


def sweep(root: Path) -> int:
    """Remove what killed writers left under ``root/tmp``; returns the bytes freed."""
    freed = 0
    for folder in list_folders(root / "tmp"):
        with contextlib.suppress(OSError):
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                size = folder_bytes(folder)
                shutil.rmtree(folder)
                freed += size
            finally:
                os.close(fd)
    return freed


def list_folders(parent: Path) -> list[Path]:
    """Folders right inside ``parent``, by name; none when it does not exist."""
    try:
        with os.scandir(parent) as found:
            return sorted(Path(e.path) for e in found if e.is_dir(follow_symlinks=False))
    except OSError:
        return []


def folder_bytes(folder: Path) -> int:
    """Sum of file sizes under ``folder``."""
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(base, name)).st_size
    return total


def write_file(path: Path, data: bytes) -> FileRef:
    """Create ``path`` with ``data``, writable by nobody whatever the umask; a reference to it."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
    return FileRef(path.name, len(data), hashlib.sha256(data).hexdigest())


def commit(folder: Path, final: Path) -> None:
    """Sync ``folder`` and rename it to ``final``; what was there before is removed."""
    final.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    for base, _, names in os.walk(folder):
        for name in names:
            _sync(Path(base) / name)
        _sync(Path(base))
    if final.exists():
        trash = folder.with_name(folder.name + "-old")
        os.rename(final, trash)
        os.rename(folder, final)
        shutil.rmtree(trash, ignore_errors=True)
    else:
        os.rename(folder, final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
