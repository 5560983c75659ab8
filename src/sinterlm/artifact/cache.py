"""The content-addressed cache: code and packed weights by two keys, bundles that name them.

    <cache>/code/<key>/      code.json  model.so  model.cpp (of a GPU: model.table)
    <cache>/weights/<key>/   weights.json  weights-00000.bin
    <cache>/bundles/<key>/   manifest.json  text.json     key = SHA-256 of manifest.json; its paths
                             lead to ../../code/<key>/model.so and ../../weights/<key>/…
    <cache>/memo/            digests of checkpoints, compilers seen, bundles by request
    <cache>/locks/  tmp/     a lock per entry; folders that are being written

An entry is checked each time it is used and rebuilt, with a word about it, when it is damaged or
unsafe to load. One process builds an entry while others wait for it. A read-only cache serves.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from sinterlm.artifact import locks, strict
from sinterlm.artifact.bundle import Bundle, open_bundle
from sinterlm.artifact.keys import CodeEntry, CodeIdentity, WeightsEntry
from sinterlm.artifact.manifest import Manifest
from sinterlm.artifact.memo import Memo
from sinterlm.artifact.progress import Progress
from sinterlm.artifact.safety import check_content, check_safe
from sinterlm.artifact.storage import commit, disk_errors, list_folders, staging, write_file
from sinterlm.errors import BundleError

KINDS = ("code", "weights", "bundles")

E = TypeVar("E")


def locate_cache(cache_dir: Path | None, environ: Mapping[str, str] | None = None) -> Path:
    """``cache_dir``, else $SINTERLM_CACHE_DIR, else ~/.cache/sinterlm; absolute.

    Raises BundleError where a user without a home folder gave neither.
    """
    env = os.environ if environ is None else environ
    named = str(cache_dir) if cache_dir is not None else env.get("SINTERLM_CACHE_DIR", "")
    path = os.path.expanduser(named or "~/.cache/sinterlm")
    if path.startswith("~"):
        raise BundleError(
            f"no home folder for user id {os.geteuid()}, so there is no place for {path}; "
            "give --cache-dir or set SINTERLM_CACHE_DIR"
        )
    return Path(os.path.abspath(path))


@dataclass(frozen=True)
class Kind(Generic[E]):
    """One kind of entry. ``load`` reads and checks a folder under its key; raises BundleError."""

    name: str
    load: Callable[[Path, str], E]


def load_code(folder: Path, key: str) -> CodeEntry:
    """A code entry whose library is safe to load and has its content. Raises BundleError."""
    entry = read_entry(CodeEntry, folder / "code.json")
    _check_key(entry.identity.key, key, folder)
    library = folder / plain_name(entry.library.path)
    check_safe(library)
    check_content(library, entry.library.nbytes, entry.library.sha256)
    return entry


def plain_name(path: str) -> str:
    """``path``, of a file in an entry's own folder. Raises BundleError for any other."""
    if os.path.basename(path) != path or path in ("", ".", ".."):
        raise BundleError(f"{path[:80]!r} leads out of a cache entry")
    return path


def load_weights(folder: Path, key: str) -> WeightsEntry:
    """A weights entry whose file has its size (its content is for ``verify``)."""
    entry = read_entry(WeightsEntry, folder / "weights.json")
    _check_key(entry.identity.key, key, folder)
    check_content(folder / "weights-00000.bin", entry.weights.nbytes, None)
    return entry


def load_bundle(folder: Path, key: str) -> Bundle:
    """A bundle whose manifest has the SHA-256 that is its key, for this or another machine."""
    bundle = open_bundle(folder, any_isa=True)
    _check_key(bundle.manifest_sha256, key, folder)
    return bundle


CODE = Kind("code", load_code)
WEIGHTS = Kind("weights", load_weights)
BUNDLES = Kind("bundles", load_bundle)


def read_entry(cls: type[E], path: Path) -> E:
    """``code.json`` or ``weights.json``, strictly. Raises BundleError."""
    try:
        return strict.from_json(cls, path.read_bytes())
    except OSError as exc:
        raise BundleError(f"cannot read {path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise BundleError(f"{path} is damaged: {exc}") from exc


def _check_key(have: str, want: str, folder: Path) -> None:
    if have != want:
        raise BundleError(f"{folder} holds the entry of another key ({have[:12]}…)")


@dataclass(frozen=True)
class Cache:
    """One cache folder. Made by ``Cache.at``; need not exist until something is written."""

    root: Path
    memo: Memo

    @classmethod
    def at(cls, root: Path) -> Cache:
        """The cache in ``root``."""
        return cls(root, Memo(root / "memo"))

    def folder(self, kind: str, key: str) -> Path:
        """Where an entry lies."""
        return self.root / kind / key

    @property
    def is_read_only(self) -> bool:
        """Whether it exists and we may not write to it."""
        return self.root.is_dir() and not os.access(self.root, os.W_OK)

    @contextlib.contextmanager
    def entry(
        self,
        kind: Kind[E],
        key: str,
        write: Callable[[Path], None],
        progress: Progress,
    ) -> Iterator[E]:
        """The entry under ``key``, written by ``write(folder)`` unless it is there and sound.

        Inside the ``with`` it is safe from ``prune``. Raises what ``write`` raises, ResourceError
        for a full disk, BundleError for a cache that lacks it and cannot be written to.
        """
        with contextlib.ExitStack() as held:
            held.enter_context(self._lock(locks.shared, kind.name, key, progress))
            found = self._load(kind, key)
            if isinstance(found, BundleError) or found is None:
                held.close()
                self._write(kind, key, write, progress)
                held.enter_context(self._lock(locks.shared, kind.name, key, progress))
                found = kind.load(self.folder(kind.name, key), key)
            self.touch(kind.name, key)
            yield found

    def _write(
        self, kind: Kind[E], key: str, write: Callable[[Path], None], progress: Progress
    ) -> None:
        """Build an entry, unless another process has done so while we waited for the lock."""
        with self._lock(locks.exclusive, kind.name, key, progress):
            found = self._load(kind, key)
            if isinstance(found, BundleError):
                progress.notify(f"rebuilding a cache entry: {found}")
            elif found is not None:
                return
            with disk_errors(self.root), staging(self.root) as folder:
                write(folder)
                commit(folder, self.folder(kind.name, key))

    def _load(self, kind: Kind[E], key: str) -> E | BundleError | None:
        """The entry; what is wrong with it; or None where there is none."""
        folder = self.folder(kind.name, key)
        if not os.path.lexists(folder):
            return None
        try:
            return kind.load(folder, key)
        except BundleError as exc:
            return exc

    @contextlib.contextmanager
    def _lock(
        self,
        take: Callable[[Path, Callable[[], None]], contextlib.AbstractContextManager[None]],
        kind: str,
        key: str,
        progress: Progress,
    ) -> Iterator[None]:
        """Hold an entry's lock; a cache we may not write to needs none, for nobody prunes it."""

        def on_wait() -> None:
            progress.notify(f"waiting for another process that is using {kind}/{key[:12]}…")

        with contextlib.ExitStack() as held:
            try:
                (self.root / "locks").mkdir(mode=0o755, parents=True, exist_ok=True)
                held.enter_context(take(self.lock_path(kind, key), on_wait))
            except OSError as exc:
                if exc.errno not in (errno.EACCES, errno.EROFS, errno.EPERM):
                    with disk_errors(self.root):
                        raise
            yield

    def lock_path(self, kind: str, key: str) -> Path:
        """The lock file of an entry."""
        return self.root / "locks" / f"{kind}-{key}.lock"

    def touch(self, kind: str, key: str) -> None:
        """Note that an entry was used now (the time of its folder), where we may."""
        with contextlib.suppress(OSError):
            os.utime(self.folder(kind, key))

    def find_code(self, identity: CodeIdentity) -> CodeIdentity:
        """The identity of a sound library that differs at most in the compiler; else ``identity``.

        For machines that cannot compile: without a compiler, or with a cache that is read-only.
        """
        if self.folder("code", identity.key).is_dir():
            return identity
        for folder in list_folders(self.root / "code"):
            with contextlib.suppress(BundleError):
                other = read_entry(CodeEntry, folder / "code.json").identity
                if identity.same_but_compiler(other):
                    return load_code(folder, folder.name).identity
        return identity

    def publish(self, manifest: Manifest, text: bytes | None, progress: Progress) -> Bundle:
        """Write a bundle under the SHA-256 of its manifest, or find it there; opened."""
        raw = manifest.to_json().encode()
        key = hashlib.sha256(raw).hexdigest()

        def write(folder: Path) -> None:
            write_file(folder / "manifest.json", raw)
            if text is not None:
                write_file(folder / "text.json", text)

        with self.entry(BUNDLES, key, write, progress) as bundle:
            return bundle

    def open(self, key: str) -> Bundle:
        """The bundle under ``key``, marked as used with all it leads to. Raises BundleError."""
        bundle = load_bundle(self.folder("bundles", key), key)
        self.touch("bundles", key)
        self.touch("code", bundle.manifest.code_key)
        if bundle.manifest.weights is not None:
            self.touch("weights", bundle.manifest.weights_key)
        return bundle
