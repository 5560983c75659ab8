"""Entries are written whole, by one process, checked at each use, and rebuilt when damaged."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sinterlm.artifact import storage
from sinterlm.artifact.bundle import open_bundle
from sinterlm.artifact.cache import CODE, WEIGHTS, Cache, locate_cache
from sinterlm.artifact.housekeeping import list_entries, prune, verify
from sinterlm.artifact.keys import CodeIdentity
from sinterlm.artifact.weights import write_weights
from sinterlm.errors import BundleError, ResourceError
from tests.artifact.builders import (
    LIBRARY,
    Recorder,
    code_identity,
    make_bundle,
    weights_identity,
    write_code,
    write_packed,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache.at(tmp_path / "cache")


def ensure_code(cache: Cache, identity: CodeIdentity, progress: Recorder) -> list[str]:
    """Use the entry; "wrote" for each time it had to be written."""
    wrote: list[str] = []

    def write(folder: Path) -> None:
        wrote.append("wrote")
        write_code(folder, identity)

    with cache.entry(CODE, identity.key, write, progress) as entry:
        assert entry.identity == identity
        assert (cache.folder("code", identity.key) / "model.so").read_bytes() == LIBRARY
    return wrote


def test_written_once_then_found(cache: Cache) -> None:
    identity, progress = code_identity(), Recorder()
    assert ensure_code(cache, identity, progress) == ["wrote"]
    assert ensure_code(cache, identity, progress) == []
    assert progress.messages == []
    assert list(storage.list_folders(cache.root / "tmp")) == []


@pytest.mark.parametrize("field", ["source_sha256", "compiler", "isa", "dtype", "sinterlm_version"])
def test_every_input_of_code_changes_its_key(field: str) -> None:
    plain = code_identity()
    changed = CodeIdentity(**{**vars(plain), field: "f" * 64})
    assert changed.key != plain.key
    assert changed.same_but_compiler(plain) == (field == "compiler")


def spoil_truncated_json(folder: Path) -> None:
    text = (folder / "code.json").read_bytes()
    rewrite(folder / "code.json", text[: len(text) // 2])


def spoil_flipped_library(folder: Path) -> None:
    data = bytearray((folder / "model.so").read_bytes())
    data[100] ^= 1
    rewrite(folder / "model.so", bytes(data))


def spoil_short_library(folder: Path) -> None:
    rewrite(folder / "model.so", LIBRARY[:-1])


def spoil_missing_library(folder: Path) -> None:
    (folder / "model.so").unlink()


def spoil_missing_json(folder: Path) -> None:
    (folder / "code.json").unlink()


def spoil_other_entry(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    write_code(folder, code_identity("int other();"))


def spoil_group_writable(folder: Path) -> None:
    os.chown(folder / "model.so", -1, 12345)
    (folder / "model.so").chmod(0o664)


def rewrite(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_truncated_json,
        spoil_flipped_library,
        spoil_short_library,
        spoil_missing_library,
        spoil_missing_json,
        spoil_other_entry,
        spoil_group_writable,
    ],
)
def test_a_damaged_entry_is_rebuilt_with_a_word(
    cache: Cache, spoil: Callable[[Path], None]
) -> None:
    identity, progress = code_identity(), Recorder()
    ensure_code(cache, identity, progress)
    if spoil is spoil_group_writable and os.geteuid() != 0:
        pytest.skip("only root can give a file to a foreign group")
    spoil(cache.folder("code", identity.key))
    assert ensure_code(cache, identity, progress) == ["wrote"]
    assert len(progress.messages) == 1 and "rebuilding" in progress.messages[0]
    assert ensure_code(cache, identity, progress) == []


def test_truncated_weights_are_rebuilt(cache: Cache) -> None:
    identity, progress = weights_identity(), Recorder()
    for expected in (True, False):
        wrote = []

        def write(folder: Path, wrote: list[int] = wrote) -> None:
            wrote.append(1)
            write_packed(folder, identity)

        with cache.entry(WEIGHTS, identity.key, write, progress):
            assert bool(wrote) == expected
    path = cache.folder("weights", identity.key) / "weights-00000.bin"
    rewrite(path, path.read_bytes()[:-1])
    with cache.entry(WEIGHTS, identity.key, lambda f: write_packed(f, identity), progress):
        assert path.stat().st_size == 4096
    assert "bytes" in progress.messages[0]


def test_a_failing_writer_leaves_nothing(cache: Cache) -> None:
    def write(folder: Path) -> None:
        write_code(folder, code_identity())
        raise KeyboardInterrupt

    key = code_identity().key
    with pytest.raises(KeyboardInterrupt), cache.entry(CODE, key, write, Recorder()):
        pass
    assert not cache.folder("code", key).exists()
    assert storage.list_folders(cache.root / "tmp") == []
    assert ensure_code(cache, code_identity(), Recorder()) == ["wrote"]


def test_full_disk_before_writing(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 100 << 20

    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: Usage)
    storage.require_space(cache.root, 30 << 20)
    with pytest.raises(ResourceError, match=r"50\.0 MB .* 104\.9 MB free.*SINTERLM_CACHE_DIR"):
        storage.require_space(cache.root, 50_000_000)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_while_writing(cache: Cache, code: int) -> None:
    def write(folder: Path) -> None:
        def chunks() -> object:
            yield 0, b"x" * 1000
            raise OSError(code, os.strerror(code))

        write_weights(folder / "weights-00000.bin", chunks(), 2000, lambda n: None)

    key = weights_identity().key
    with (
        pytest.raises(ResourceError, match="is full"),
        cache.entry(WEIGHTS, key, write, Recorder()),
    ):
        pass
    assert storage.folder_bytes(cache.root / "tmp") == 0


def test_a_disk_that_is_really_full(cache: Cache) -> None:
    """/dev/full answers every write with ENOSPC."""

    def write(folder: Path) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    with (
        pytest.raises(ResourceError, match="is full"),
        cache.entry(CODE, code_identity().key, write, Recorder()),
    ):
        pass


def test_unwritable_cache_names_the_way_out(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("a file where the cache should be")
    cache = Cache.at(blocker / "cache")
    with pytest.raises(BundleError, match=r"--cache-dir.*SINTERLM_CACHE_DIR"):
        ensure_code(cache, code_identity(), Recorder())


def test_read_only_cache_serves(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attempt to create or change a file fails, as on a read-only image layer."""
    identity = code_identity()
    ensure_code(cache, identity, Recorder())
    real_open = os.open

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    def open_read_only(path: str, flags: int, *args: int, **kwargs: object) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse()
        return real_open(path, flags, *args)

    for name in ("mkdir", "rename", "replace", "utime", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(os, "open", open_read_only)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert ensure_code(cache, identity, Recorder()) == []
    with pytest.raises(BundleError, match="cache-dir"):
        ensure_code(cache, code_identity("int g();"), Recorder())


def test_any_compiler_serves_where_none_is_installed(cache: Cache) -> None:
    made = code_identity(compiler="clang++ 17")
    ensure_code(cache, made, Recorder())
    assert cache.find_code(code_identity(compiler="")) == made
    other = code_identity("int g();", compiler="")
    assert cache.find_code(other) == other


def test_umask_does_not_make_entries_unsafe(cache: Cache) -> None:
    old = os.umask(0)
    try:
        bundle = make_bundle(cache)
    finally:
        os.umask(old)
    assert bundle.library_path.stat().st_mode & 0o022 == 0
    assert bundle.library_path.parent.stat().st_mode & 0o022 == 0


KILLED_WRITER = """
import sys, time
from pathlib import Path
from sinterlm.artifact.cache import CODE, Cache
from tests.artifact.builders import Recorder, code_identity, write_code
def write(folder):
    write_code(folder, code_identity())
    print("writing", flush=True)
    time.sleep(60)
with Cache.at(Path(sys.argv[1])).entry(CODE, code_identity().key, write, Recorder()):
    pass
"""


def test_killed_writer(cache: Cache) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_WRITER, str(cache.root)], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"writing\n"
    assert prune(cache).leftover_bytes == 0, "a living writer's folder is not swept"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(storage.list_folders(cache.root / "tmp")) == 1
    assert not cache.folder("code", code_identity().key).exists()
    assert ensure_code(cache, code_identity(), Recorder()) == ["wrote"]
    assert prune(cache).leftover_bytes > len(LIBRARY)
    assert storage.list_folders(cache.root / "tmp") == []
    assert ensure_code(cache, code_identity(), Recorder()) == []


CONCURRENT_WRITER = """
import sys, time
from pathlib import Path
from sinterlm.artifact.cache import CODE, Cache
from tests.artifact.builders import Recorder, code_identity, write_code
seen = Recorder()
def write(folder):
    print("wrote", flush=True)
    time.sleep(0.5)
    write_code(folder, code_identity())
with Cache.at(Path(sys.argv[1])).entry(CODE, code_identity().key, write, seen) as entry:
    print("has", entry.library.sha256[:8], *seen.messages, flush=True)
"""


def test_many_processes_do_the_work_once(cache: Cache) -> None:
    command = [sys.executable, "-c", CONCURRENT_WRITER, str(cache.root)]
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert "".join(outputs).count("wrote") == 1
    assert all("has " in text for text in outputs)


def test_who_waited_for_the_lock_finds_the_work_done(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process writes between our look at the entry and our turn to write it."""
    ensure_code(cache, code_identity(), Recorder())
    real_load, looks = Cache._load, []

    def load(self: Cache, *args: object) -> object:
        looks.append(1)
        return None if len(looks) == 1 else real_load(self, *args)

    monkeypatch.setattr(Cache, "_load", load)
    assert ensure_code(cache, code_identity(), Recorder()) == []


def test_prune_leaves_what_is_held(cache: Cache) -> None:
    identity = code_identity()
    with cache.entry(CODE, identity.key, lambda f: write_code(f, identity), Recorder()):
        report = prune(cache, everything=True)
        assert [e.kind for e in report.in_use] == ["code"]
        assert cache.folder("code", identity.key).exists()
    assert [e.kind for e in prune(cache, everything=True).removed] == ["code"]
    assert list_entries(cache) == []


def test_prune_by_age_and_size(cache: Cache) -> None:
    bundle = make_bundle(cache)
    other = code_identity("int g();")
    ensure_code(cache, other, Recorder())
    now = time.time()
    os.utime(cache.folder("code", other.key), (now - 10 * 86400,) * 2)
    entries = list_entries(cache)
    assert [e.kind for e in entries].count("code") == 2
    assert all(e.model == "tiny" and e.nbytes > 0 and e.created > 0 for e in entries)
    assert prune(cache).removed == ()
    assert [e.key for e in prune(cache, older_than_days=5).removed] == [other.key]
    open_bundle(bundle.root)
    report = prune(cache, max_bytes=0)
    assert len(report.removed) == 3 and report.freed_bytes > 4096
    assert list_entries(cache) == []


def test_prune_removes_bundles_whose_parts_are_gone(cache: Cache) -> None:
    bundle = make_bundle(cache)
    weights = cache.folder("weights", bundle.manifest.weights_key)
    now = time.time()
    os.utime(weights, (now - 10 * 86400,) * 2)
    assert {e.kind for e in prune(cache, older_than_days=5).removed} == {"weights", "bundles"}


def test_verify_reads_everything(cache: Cache) -> None:
    bundle = make_bundle(cache)
    read: list[int] = []
    assert verify(cache, read.append) == []
    assert sum(read) == sum(e.nbytes for e in list_entries(cache))
    assert bundle.weights_path is not None
    data = bytearray(bundle.weights_path.read_bytes())
    data[64] ^= 1
    rewrite(bundle.weights_path, bytes(data))
    open_bundle(bundle.root)  # same size: seen by verify alone
    problems = verify(cache)
    assert [(p.kind, p.key) for p in problems] == [("weights", bundle.manifest.weights_key)]
    assert "SHA-256" in problems[0].message


def test_locate_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = {"SINTERLM_CACHE_DIR": str(tmp_path)}
    assert locate_cache(None, named) == tmp_path
    assert locate_cache(tmp_path / "x", named) == tmp_path / "x"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate_cache(None, {}) == tmp_path / ".cache/sinterlm"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random container uid has no entry in the password file, and perhaps no $HOME."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(BundleError, match="SINTERLM_CACHE_DIR"):
        locate_cache(None, {})
