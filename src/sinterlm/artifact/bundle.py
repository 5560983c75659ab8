"""A bundle on disk: a folder with ``manifest.json`` that leads to library, weights and text.

``open_bundle`` is the only door: it refuses what is damaged, unsafe to load, of another format or
ABI, or built for an ISA level that this machine lacks. Weights are checked by size here and by
content in ``cache verify``: reading them twice at each start would double the start.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from sinterlm.artifact.isa import check_isa
from sinterlm.artifact.manifest import FileRef, Manifest
from sinterlm.artifact.safety import check_content, check_safe
from sinterlm.artifact.storage import commit, disk_errors, require_space, write_file
from sinterlm.artifact.text import TextAssets
from sinterlm.errors import BundleError, UsageError
from sinterlm.options import CompileOptions

_MAX_MANIFEST_BYTES = 64 << 20


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its files were there, with the right sizes and hashes, when opened."""

    root: Path  #: folder of manifest.json
    manifest: Manifest
    manifest_sha256: str  #: what ``--bundle-sha256`` pins; in the cache also the bundle's key

    @property
    def library_path(self) -> Path:
        """The shared library."""
        return self._path(self.manifest.library)

    @property
    def weights_path(self) -> Path | None:
        """The packed weights; None in a code-only bundle."""
        ref = self.manifest.weights
        return None if ref is None else self._path(ref)

    def text(self) -> TextAssets:
        """Tokenizer, template and defaults; empty when the bundle has none."""
        ref = self.manifest.text
        if ref is None:
            return TextAssets()
        path = self._path(ref)
        check_content(path, ref.nbytes, ref.sha256)
        return TextAssets.from_json(path.read_text(encoding="utf-8"))

    def files(self) -> Iterator[tuple[Path, FileRef]]:
        """Every file beside the manifest."""
        for ref in (self.manifest.library, self.manifest.weights, self.manifest.text):
            if ref is not None:
                yield self._path(ref), ref

    def _path(self, ref: FileRef) -> Path:
        return Path(os.path.normpath(self.root / ref.path))


def is_bundle(path: str | Path) -> bool:
    """Whether ``path`` is a folder that holds a manifest."""
    return os.path.isfile(os.path.join(path, "manifest.json"))


def open_bundle(
    path_or_key: str | Path,
    cache_dir: Path | None = None,
    bundle_sha256: str | None = None,
    euid: int | None = None,
    any_isa: bool = False,
) -> Bundle:
    """Open a bundle by its folder, or by its key (or 8 or more first digits) in ``cache_dir``.

    ``euid`` is the user to judge file safety for, None = ours; ``any_isa`` accepts libraries for
    other machines (to inspect, export or verify them). Raises BundleError, with the command that
    repairs it, and UsageError for a pin that is no SHA-256.
    """
    folder = _locate(path_or_key, cache_dir)
    raw, digest = read_manifest(folder, euid)
    check_pin(digest, bundle_sha256)
    bundle = Bundle(folder, Manifest.from_json(raw), digest)
    if not any_isa:
        _check_machine(bundle.manifest)
    check_safe(bundle.library_path, euid)
    for path, ref in bundle.files():
        whole = ref is not bundle.manifest.weights
        check_content(path, ref.nbytes, ref.sha256 if whole else None)
    return bundle


def _check_machine(manifest: Manifest) -> None:
    """Raises BundleError unless this machine can run what the bundle was built for."""
    if manifest.target == "cpu":  # whether a GPU fits shows when its driver loads the kernels
        check_isa(manifest.isa)


def read_manifest(folder: Path, euid: int | None = None) -> tuple[bytes, str]:
    """Bytes of ``folder/manifest.json`` and their SHA-256. Raises BundleError."""
    path = folder / "manifest.json"
    check_safe(path, euid)
    try:
        with open(path, "rb") as file:
            raw = file.read(_MAX_MANIFEST_BYTES + 1)
    except OSError as exc:
        raise BundleError(f"cannot read {path}: {exc.strerror}") from exc
    if len(raw) > _MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} is larger than any manifest; it is not ours")
    return raw, hashlib.sha256(raw).hexdigest()


def check_compiled_as(manifest: Manifest, options: CompileOptions) -> None:
    """Raises UsageError where ``options`` asks a finished bundle to be another one."""
    if options.target != manifest.target:
        raise UsageError(
            f"the bundle is compiled for {manifest.target} and --target is {options.target}: give "
            f"--target {manifest.target} to use it, or compile the checkpoint again"
        )
    kv_cache_dtype = None if options.kv_cache_dtype == "auto" else options.kv_cache_dtype
    asked: list[tuple[str, str | None, str]] = [
        ("dtype", None if options.dtype == "auto" else options.dtype, manifest.dtype),
        ("isa", options.isa, manifest.isa),
        ("quantization", options.quantization, str(manifest.quantization).split(" ")[0]),
        ("kv_cache_dtype", kv_cache_dtype, manifest.kv_cache_dtype),
    ]
    for name, wanted, have in asked:
        if wanted not in (None, have):
            raise UsageError(
                f"{name}={wanted!r}, and this bundle was compiled with {name}={have}; compile "
                "the checkpoint again, or leave the option out"
            )
    given = {
        "load_format": options.load_format != "auto",
        "revision": options.revision is not None,
        "dump_dir": options.dump_dir is not None,
        "code_only": options.code_only,
        "tiles": options.tiles is not None,
        "vendor_gemm": options.vendor_gemm,
        "quant_group": options.quant_group is not None,
        "act_dtype": options.act_dtype is not None,
        "tensor_parallel_size": options.tensor_parallel_size != 1,
    }
    for name in (name for name, is_given in given.items() if is_given):
        raise UsageError(f"{name} has a meaning for checkpoints only, and the model is a bundle")


def parse_pin(pin: str | None) -> str | None:
    """A pin in lower case. Raises UsageError where it is no SHA-256."""
    if pin is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", pin):
        raise UsageError(f"--bundle-sha256 {pin!r} is not a SHA-256 (64 hexadecimal digits)")
    return None if pin is None else pin.lower()


def check_pin(digest: str, pin: str | None) -> None:
    """Raises BundleError when a pin is given and is not ``digest``."""
    wanted = parse_pin(pin)
    if wanted is not None and wanted != digest:
        raise BundleError(
            f"the bundle's manifest has SHA-256 {digest}, and --bundle-sha256 asks for {wanted}; "
            "compile the version you pinned, or pin this one after checking it"
        )


def _locate(path_or_key: str | Path, cache_dir: Path | None) -> Path:
    """The folder that a path or a key means."""
    if is_bundle(path_or_key):
        return Path(os.path.realpath(path_or_key))
    key = str(path_or_key)
    if cache_dir is not None and re.fullmatch(r"[0-9a-f]{8,64}", key):
        found = sorted((cache_dir / "bundles").glob(f"{key}*/manifest.json"))
        if len(found) == 1:
            return found[0].parent
        if found:
            raise BundleError(f"{len(found)} bundles begin with {key}; give more digits")
    raise BundleError(
        f"no bundle at {key!r} (no manifest.json there); make one with "
        "`sinterlm compile MODEL -o DIR`, or list the cache with `sinterlm cache ls`"
    )


def export_bundle(bundle: Bundle, out_dir: Path) -> Bundle:
    """Write a self-contained copy to ``out_dir``, hard-linked where the disk allows it.

    ``out_dir`` must not exist, be empty, or hold a bundle, which is replaced. The copy's manifest
    names files beside it, hence has a SHA-256 of its own. Raises UsageError for another folder,
    ResourceError and BundleError as writing does.
    """
    out = Path(os.path.abspath(out_dir))
    if out.exists() and not (out.is_dir() and (is_bundle(out) or not any(out.iterdir()))):
        raise UsageError(f"{out} exists and is not a bundle; give -o a new folder")
    with disk_errors(out, "give -o another folder"):
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = out.with_name(f".{out.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
        folder.mkdir(mode=0o755)
        try:
            refs = {id(ref): _export_file(path, ref, folder) for path, ref in bundle.files()}
            old = bundle.manifest
            manifest = replace(
                old,
                library=refs[id(old.library)],
                weights=refs[id(old.weights)] if old.weights else None,
                text=refs[id(old.text)] if old.text else None,
            )
            write_file(folder / "manifest.json", manifest.to_json().encode())
            commit(folder, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return open_bundle(out, any_isa=True)


def _export_file(source: Path, ref: FileRef, folder: Path) -> FileRef:
    """Link or copy one file into ``folder``; its reference there."""
    target = folder / source.name
    try:
        os.link(source, target)
    except OSError:
        require_space(folder, ref.nbytes)
        shutil.copyfile(source, target)
        target.chmod(0o444)
    return replace(ref, path=target.name)
