"""Is a file safe to load as code, and is its content what was promised?

The rule: the file and its folder belong to root or to the user we run as, and nobody else may
write to them. "Nobody else" is read off the mode bits:

* group-write is allowed only for group 0, whose members are root's equals (images for random
  container uids are made with ``chgrp 0`` and ``chmod g=u``);
* a folder that others may write to is accepted only if sticky (as /tmp): they can add files there,
  but cannot replace ours, and a planted file fails the owner test;
* on a file system mounted read-only the bits do not matter, owners still do.

Folders further up are not asked: who may rename one of them can only put a folder of their own in
its place, and its owner gives it away. POSIX ACLs show through as group bits.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from sinterlm.errors import BundleError

_CHUNK = 1 << 20


def check_safe(path: Path, euid: int | None = None) -> None:
    """Raises BundleError where ``path`` or its folder could be changed by another user.

    ``euid`` is the user to judge for; None = ours. Symbolic links are followed first.
    """
    uid = os.geteuid() if euid is None else euid
    real = Path(os.path.realpath(path))
    _check_one(real, uid, is_folder=False)
    _check_one(real.parent, uid, is_folder=True)


def _check_one(path: Path, uid: int, is_folder: bool) -> None:
    try:
        st = os.stat(path)
        read_only = bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except OSError as exc:
        raise BundleError(f"cannot read {path}: {exc.strerror}") from exc
    if is_folder != stat.S_ISDIR(st.st_mode) or not (is_folder or stat.S_ISREG(st.st_mode)):
        raise BundleError(f"{path} is not a regular {'folder' if is_folder else 'file'}")
    if st.st_uid not in (0, uid):
        raise BundleError(
            f"refusing to load code from {path}: it belongs to user id {st.st_uid}, neither root "
            f"nor the current user ({uid}); give --cache-dir a folder of your own, or chown it"
        )
    group = bool(st.st_mode & stat.S_IWGRP) and st.st_gid != 0
    others = bool(st.st_mode & stat.S_IWOTH)
    sticky = is_folder and bool(st.st_mode & stat.S_ISVTX)
    if (group or others) and not sticky and not read_only:
        raise BundleError(
            f"refusing to load code from {path}: other users may write to it; "
            f"run `chmod go-w {path}` if you trust what is in it"
        )


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces of 1 MiB. Raises OSError."""
    total = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(_CHUNK):
            total.update(piece)
    return total.hexdigest()


def check_content(path: Path, nbytes: int, sha256: str | None) -> None:
    """Raises BundleError unless ``path`` has ``nbytes`` bytes and (if given) that SHA-256."""
    try:
        have = os.stat(path).st_size
        if have != nbytes:
            raise BundleError(f"{path} has {have} bytes, and {nbytes} were written")
        if sha256 is not None and sha256_file(path) != sha256:
            raise BundleError(f"{path} does not have the content that was written (SHA-256)")
    except OSError as exc:
        raise BundleError(f"cannot read {path}: {exc.strerror}") from exc
