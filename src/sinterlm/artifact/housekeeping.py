"""``sinterlm cache ls | prune | verify``: what the cache holds, making room, finding damage.

Nothing that another process holds is ever removed; an entry that is memory-mapped by a running
engine stays readable to it after its removal.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sinterlm.artifact import locks
from sinterlm.artifact.bundle import read_manifest
from sinterlm.artifact.cache import (
    KINDS,
    Cache,
    load_bundle,
    load_code,
    load_weights,
    plain_name,
    read_entry,
)
from sinterlm.artifact.keys import CodeEntry, WeightsEntry
from sinterlm.artifact.manifest import Manifest
from sinterlm.artifact.safety import check_content
from sinterlm.artifact.storage import disk_errors, folder_bytes, list_folders, sweep
from sinterlm.errors import BundleError

_DAY = 86_400.0


@dataclass(frozen=True)
class Entry:
    """One entry of the cache."""

    kind: str  #: code | weights | bundles
    key: str
    model: str  #: what it was made for; "?" when it is damaged
    nbytes: int
    created: float  #: seconds since 1970; 0 when it is damaged
    last_used: float  #: seconds since 1970


@dataclass(frozen=True)
class Problem:
    """An entry that cannot be used, and why."""

    kind: str
    key: str
    path: Path
    message: str


@dataclass(frozen=True)
class Pruned:
    """What ``prune`` did."""

    removed: tuple[Entry, ...] = ()
    in_use: tuple[Entry, ...] = ()  #: chosen, but held by another process
    leftover_bytes: int = 0  #: of writers that were killed
    freed_bytes: int = 0  #: in all


def list_entries(cache: Cache) -> list[Entry]:
    """Every entry, most recently used first; damaged ones too."""
    found = [
        _describe(cache, kind, folder)
        for kind in KINDS
        for folder in list_folders(cache.root / kind)
    ]
    return sorted(found, key=lambda e: (-e.last_used, e.kind, e.key))


def _describe(cache: Cache, kind: str, folder: Path) -> Entry:
    model, created, used = "?", 0.0, 0.0
    with contextlib.suppress(BundleError, OSError):
        used = folder.stat().st_mtime
        if kind == "bundles":
            manifest = Manifest.from_json(read_manifest(folder)[0])
            model, created = manifest.model, (folder / "manifest.json").stat().st_mtime
        elif kind == "code":
            code = read_entry(CodeEntry, folder / "code.json")
            model, created = code.model, code.created
        else:
            packed = read_entry(WeightsEntry, folder / "weights.json")
            model, created = packed.model, packed.created
    return Entry(kind, folder.name, model, folder_bytes(folder), created, used)


def prune(
    cache: Cache,
    older_than_days: float | None = None,
    max_bytes: int | None = None,
    everything: bool = False,
    now: float | None = None,
) -> Pruned:
    """Remove entries unused for so many days, then the least recently used beyond ``max_bytes``.

    Always removes what killed writers left, and bundles whose code or weights are gone. Without a
    limit it removes nothing else.
    """
    leftovers = sweep(cache.root)
    entries = list_entries(cache)
    chosen = _choose(entries, older_than_days, max_bytes, everything, now or time.time())
    removed, in_use = _remove(cache, chosen)
    gone, held = _remove(cache, list(_dangling(cache)))
    if everything:
        shutil.rmtree(cache.root / "memo", ignore_errors=True)
    removed, in_use = removed + gone, in_use + held
    freed = leftovers + sum(e.nbytes for e in removed)
    return Pruned(tuple(removed), tuple(in_use), leftovers, freed)


def _choose(
    entries: list[Entry],
    older_than_days: float | None,
    max_bytes: int | None,
    everything: bool,
    now: float,
) -> list[Entry]:
    """``entries`` come most recently used first, so what is kept is a prefix by size."""
    chosen, kept = [], 0
    for entry in entries:
        old = older_than_days is not None and entry.last_used < now - older_than_days * _DAY
        large = max_bytes is not None and kept + entry.nbytes > max_bytes
        if everything or old or large:
            chosen.append(entry)
        else:
            kept += entry.nbytes
    return chosen


def _dangling(cache: Cache) -> Iterator[Entry]:
    """Bundles that lead to files which are no longer there."""
    for folder in list_folders(cache.root / "bundles"):
        with contextlib.suppress(BundleError):
            manifest = Manifest.from_json(read_manifest(folder)[0])
            refs = (manifest.library, manifest.weights, manifest.text)
            if any(ref is not None and not (folder / ref.path).exists() for ref in refs):
                yield _describe(cache, "bundles", folder)


def _remove(cache: Cache, entries: list[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Remove entries nobody holds: those removed, and those in use."""
    removed: list[Entry] = []
    in_use: list[Entry] = []
    for entry in entries:
        lock = cache.lock_path(entry.kind, entry.key)
        with disk_errors(cache.root):
            lock.parent.mkdir(mode=0o755, exist_ok=True)
            with locks.try_exclusive(lock, delete=True) as alone:
                if alone:
                    shutil.rmtree(cache.folder(entry.kind, entry.key))
                (removed if alone else in_use).append(entry)
    return removed, in_use


def verify(cache: Cache, advance: Callable[[int], None] | None = None) -> list[Problem]:
    """Read every byte of every entry and compare hashes; ``advance`` gets the bytes read.

    What it names is rebuilt at the next use, or removed by ``prune``.
    """
    problems = []
    for kind in KINDS:
        for folder in list_folders(cache.root / kind):
            try:
                _verify_one(kind, folder)
            except BundleError as exc:
                problems.append(Problem(kind, folder.name, folder, str(exc)))
            if advance is not None:
                advance(folder_bytes(folder))
    return problems


def _verify_one(kind: str, folder: Path) -> None:
    """Raises BundleError where an entry is not what was written."""
    key = folder.name
    if kind == "code":
        code = load_code(folder, key)
        check_content(folder / plain_name(code.source.path), code.source.nbytes, code.source.sha256)
    elif kind == "weights":
        packed = load_weights(folder, key)
        path = folder / "weights-00000.bin"
        check_content(path, packed.weights.nbytes, packed.weights.sha256)
    else:
        load_bundle(folder, key)
