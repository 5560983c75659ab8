"""A bundle is opened only if it is whole, safe to load, pinned as asked, and for this machine."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sinterlm.artifact import isa
from sinterlm.artifact.bundle import Bundle, export_bundle, is_bundle, open_bundle
from sinterlm.artifact.cache import Cache
from sinterlm.artifact.safety import check_safe
from sinterlm.errors import BundleError, UsageError
from tests.artifact.builders import LIBRARY, TEXT, make_bundle

ME = os.geteuid()


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(Cache.at(tmp_path / "cache"))


def test_opened_by_path_and_by_key(bundle: Bundle, tmp_path: Path) -> None:
    assert open_bundle(bundle.root) == bundle
    assert open_bundle(bundle.manifest_sha256, tmp_path / "cache") == bundle
    assert open_bundle(bundle.manifest_sha256[:8], tmp_path / "cache") == bundle
    assert bundle.root.name == bundle.manifest_sha256
    assert bundle.library_path.read_bytes() == LIBRARY
    assert bundle.text().to_json().encode() == TEXT


def test_a_bundle_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="sinterlm compile"):
        open_bundle(tmp_path / "none")
    with pytest.raises(BundleError, match="no bundle at"):
        open_bundle("ab" * 32, tmp_path)


def test_the_cache_may_move(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    moved = open_bundle(bundle.manifest_sha256, tmp_path / "elsewhere")
    assert moved.library_path.read_bytes() == LIBRARY


def test_pin(bundle: Bundle) -> None:
    pin = bundle.manifest_sha256
    assert open_bundle(bundle.root, bundle_sha256=pin.upper()) == bundle
    with pytest.raises(BundleError, match=f"{pin}.*asks for {'0' * 64}"):
        open_bundle(bundle.root, bundle_sha256="0" * 64)
    with pytest.raises(UsageError, match="64 hexadecimal"):
        open_bundle(bundle.root, bundle_sha256=pin[:10])


def rewrite(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def test_changed_library_is_refused(bundle: Bundle) -> None:
    rewrite(bundle.library_path, LIBRARY.replace(b"not", b"yes"))
    with pytest.raises(BundleError, match="SHA-256"):
        open_bundle(bundle.root)


def test_changed_text_is_refused(bundle: Bundle) -> None:
    rewrite(bundle.root / "text.json", TEXT.replace(b"messages", b"massages"))
    with pytest.raises(BundleError, match="SHA-256"):
        open_bundle(bundle.root)


def test_weights_of_another_size_are_refused(bundle: Bundle) -> None:
    assert bundle.weights_path is not None
    rewrite(bundle.weights_path, b"")
    with pytest.raises(BundleError, match="0 bytes, and 4096"):
        open_bundle(bundle.root)


def test_missing_files_are_refused(bundle: Bundle) -> None:
    bundle.library_path.unlink()
    with pytest.raises(BundleError, match="No such file"):
        open_bundle(bundle.root)


def test_isa_that_this_machine_lacks(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = replace(bundle.manifest, isa="avx512bf16")
    rewrite(bundle.root / "manifest.json", manifest.to_json().encode())
    monkeypatch.setattr(isa, "cpu_flags", lambda root: isa.REQUIRED_CPU_FLAGS["avx2"])
    with pytest.raises(BundleError, match=r"avx512bf16.*only avx2, generic.*--isa avx2"):
        open_bundle(bundle.root)
    assert open_bundle(bundle.root, any_isa=True).manifest.isa == "avx512bf16"


# ---------------------------------------------------------------- who may write

OTHER = ME + 4321


def owned_by_other(path: Path) -> None:
    os.chown(path, OTHER, -1)


def writable_by_others(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o002)


def writable_by_group(path: Path) -> None:
    os.chown(path, -1, OTHER)
    path.chmod(path.stat().st_mode | 0o020)


@pytest.mark.parametrize("spoil", [owned_by_other, writable_by_others, writable_by_group])
@pytest.mark.parametrize("what", ["library", "folder", "manifest"])
def test_files_others_could_change(
    bundle: Bundle, spoil: Callable[[Path], None], what: str
) -> None:
    if ME != 0 and spoil is not writable_by_others:
        pytest.skip("only root can give files away")
    paths = {
        "library": bundle.library_path,
        "folder": bundle.library_path.parent,
        "manifest": bundle.root / "manifest.json",
    }
    spoil(paths[what])
    with pytest.raises(BundleError, match="refusing to load") as caught:
        open_bundle(bundle.root)
    assert str(paths[what]) in str(caught.value)


def test_a_random_container_uid_loads_what_root_owns(tmp_path: Path) -> None:
    """An image layer made by root, as OpenShift asks: group 0 with the owner's rights."""
    if ME != 0:
        pytest.skip("needs files that belong to root")
    bundle = make_bundle(Cache.at(tmp_path / "cache"))
    for path in (bundle.library_path, bundle.library_path.parent, bundle.root):
        os.chown(path, 0, 0)
        path.chmod(path.stat().st_mode | 0o060)
    assert open_bundle(bundle.root, euid=1_000_650_000) == bundle


def test_a_random_container_uid_loads_its_own(bundle: Bundle) -> None:
    if ME != 0:
        pytest.skip("only root can give files away")
    uid = 1_000_650_000
    for path in (*(p for p, _ in bundle.files()), bundle.root / "manifest.json"):
        os.chown(path, uid, -1)
        os.chown(path.parent, uid, -1)
    assert open_bundle(bundle.root, euid=uid) == bundle
    with pytest.raises(BundleError, match=f"user id {uid}"):
        open_bundle(bundle.root, euid=uid + 1)


def test_a_sticky_folder_is_accepted_for_our_own_file(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    path = folder / "model.so"
    path.write_bytes(b"x")
    folder.chmod(0o777)
    with pytest.raises(BundleError, match=f"chmod go-w {folder}"):
        check_safe(path)
    folder.chmod(0o1777)
    check_safe(path)


def test_links_are_followed_before_asking(tmp_path: Path) -> None:
    unsafe = tmp_path / "unsafe"
    unsafe.mkdir()
    (unsafe / "model.so").write_bytes(b"x")
    unsafe.chmod(0o777)
    (tmp_path / "model.so").symlink_to(unsafe / "model.so")
    with pytest.raises(BundleError, match=str(unsafe)):
        check_safe(tmp_path / "model.so")


def test_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.so")
    with pytest.raises(BundleError, match="not a regular file"):
        check_safe(tmp_path / "model.so")


# ---------------------------------------------------------------- export


def test_export_stands_alone(bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    copy = export_bundle(bundle, out)
    assert {p.name for p in out.iterdir()} == {
        "manifest.json", "model.so", "weights-00000.bin", "text.json",
    }  # fmt: skip
    assert copy.root == out and is_bundle(out)
    assert copy.manifest_sha256 != bundle.manifest_sha256
    names = {path.name for path, _ in copy.files()}
    assert all(ref.path in names for _, ref in copy.files())
    assert export_bundle(copy, tmp_path / "again").manifest_sha256 == copy.manifest_sha256
    assert export_bundle(bundle, out).manifest_sha256 == copy.manifest_sha256, "replaces itself"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_export_copies_where_it_cannot_link(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    copy = export_bundle(bundle, tmp_path / "out")
    assert copy.library_path.stat().st_nlink == 1
    assert open_bundle(copy.root).text() == bundle.text()


def test_export_replaces_nothing_else(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not a bundle"):
        export_bundle(bundle, tmp_path / "data")
    assert (tmp_path / "data/thesis.txt").exists()
    assert export_bundle(bundle, tmp_path / "fresh/deep").root.is_dir()
    with pytest.raises(BundleError, match="give -o another folder"):
        export_bundle(bundle, Path("/dev/null/bundle"))


def test_refused_bytes_are_never_loaded(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a bundle reads its library as data; it does not load it."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a library was loaded while its bundle was being checked")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert json.loads((open_bundle(bundle.root).root / "manifest.json").read_text())["abi_version"]
