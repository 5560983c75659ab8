"""The warm start: from a request straight to its bundle; no weights read, no graph built.

A fact "this request gave that bundle" holds as long as the checkpoint's files, SinterLM's own
files and the compiler are the ones it was made with. It only saves work: the bundle it leads to
goes through every check of ``open_bundle``. A Hub id is looked up again when its ref moves.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, replace
from pathlib import Path

from sinterlm import __version__
from sinterlm.artifact.bundle import Bundle
from sinterlm.artifact.cache import Cache
from sinterlm.artifact.memo import FileStamp, digest_json
from sinterlm.artifact.progress import Progress
from sinterlm.errors import BundleError
from sinterlm.options import CompileOptions

#: FileStamps in JSON form, sorted.
Stamps = list[list[str | int]]

_TOPIC = "requests"
_PACKAGE = Path(__file__).resolve().parents[1]
_COMPILE_SIDE = ("artifact", "backends", "frontend", "ir", "passes")
_CHECKPOINT_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".safetensors", ".gguf")


def stamps(path: Path | None) -> Stamps:
    """Stamps of all files that a checkpoint at ``path`` may be read from, in JSON form.

    A folder counts with every file in it that could matter, so that a tokenizer edited or added
    later is noticed; a folder of the Hub's cache also with the ref that led to it. None: no files.
    """
    if path is None:
        return []
    files = [path]
    if path.is_dir():
        files = [p for p in path.iterdir() if p.suffix in _CHECKPOINT_SUFFIXES and p.is_file()]
        if path.parent.name == "snapshots":
            files += [p for p in (path.parent.parent / "refs").rglob("*") if p.is_file()]
    return sorted(FileStamp.of(p).as_list() for p in files)


def recall(
    options: CompileOptions,
    isa: str,
    inputs: str,
    compiler: str | None,
    cache: Cache,
    progress: Progress,
) -> Bundle | None:
    """The bundle this request gave before, or None where that has to be found out again.

    ``inputs`` is the backend's ``inputs_sha256``. ``compiler`` None (none is installed) accepts the
    library of any.
    """
    if options.dump_dir is not None:
        return None
    fact = cache.memo.recall(_TOPIC, _request_key(options, isa, inputs))
    if fact is None or not isinstance(fact.get("bundle"), str):
        return None
    path = fact.get("path")
    try:
        same = stamps(Path(path) if isinstance(path, str) else None) == fact.get("stamps")
    except (OSError, ValueError):
        return None
    if not same or (compiler is not None and fact.get("compiler") != compiler):
        return None
    try:
        return cache.open(fact["bundle"])
    except BundleError as exc:
        if cache.folder("bundles", fact["bundle"]).exists():
            progress.notify(f"checking the cache again: {exc}")
        return None


def remember(
    options: CompileOptions,
    isa: str,
    inputs: str,
    compiler: str | None,
    cache: Cache,
    path: Path | None,
    seen: Stamps,
    bundle: Bundle,
) -> None:
    """Note that this request gave ``bundle`` from the checkpoint at ``path`` as ``seen``."""
    fact = {
        "bundle": bundle.manifest_sha256,
        "compiler": compiler,
        "path": None if path is None else str(path),
        "stamps": seen,
    }
    cache.memo.remember(_TOPIC, _request_key(options, isa, inputs), fact)


def _request_key(options: CompileOptions, isa: str, inputs: str) -> str:
    """Key of everything asked for; where things lie and who asks do not count."""
    plain = replace(options, cache_dir=None, dump_dir=None, bundle_sha256=None, isa=None,
                    tiles=None)  # fmt: skip
    path = os.path.expanduser(options.model)
    model = os.path.realpath(path) if os.path.exists(path) else None
    return digest_json([asdict(plain), model, isa, inputs, __version__, package_stamp()])


def package_stamp() -> str:
    """Changes whenever a file of the compile side does: an edited kernel must not be served stale
    under an unchanged version number."""
    found = [_PACKAGE / "compile.py", _PACKAGE / "options.py"]
    for part in _COMPILE_SIDE:
        for base, _, names in os.walk(_PACKAGE / part):
            found += [Path(base) / n for n in names if n.endswith((".py", ".h", ".json"))]
    total = hashlib.sha256()
    for path in sorted(found):
        st = path.stat()
        line = f"{path.relative_to(_PACKAGE)}\0{st.st_size}\0{st.st_mtime_ns}\n"
        total.update(line.encode())
    return total.hexdigest()
