"""Hand-made cache entries and bundles: small, and sound unless a test breaks them."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path

from sinterlm.artifact import strict
from sinterlm.artifact.bundle import Bundle
from sinterlm.artifact.cache import CODE, WEIGHTS, Cache
from sinterlm.artifact.keys import CodeEntry, CodeIdentity, WeightsEntry, WeightsIdentity
from sinterlm.artifact.manifest import (
    ABI_VERSION,
    FORMAT_VERSION,
    Constants,
    FileRef,
    Manifest,
    ModelShape,
    OpCost,
)
from sinterlm.artifact.storage import write_file
from sinterlm.artifact.text import TextAssets
from sinterlm.artifact.weights import write_weights

LIBRARY = b"\x7fELF not really" * 50
TEXT = TextAssets(chat_template="{{ messages }}").to_json().encode()


@dataclass
class Recorder:
    """A Progress that remembers what it was told."""

    stages: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    done: int = 0

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        self.stages.append(name)

    def advance(self, amount: int) -> None:
        self.done += amount

    def notify(self, message: str) -> None:
        self.messages.append(message)


def code_identity(source: str = "int f();", compiler: str = "g++ 12") -> CodeIdentity:
    return CodeIdentity(
        source_sha256=hashlib.sha256(source.encode()).hexdigest(),
        headers_sha256="0" * 64,
        compiler=compiler,
        flags=("-O2",),
        target="cpu",
        isa="generic",
        dtype="bf16",
        sinterlm_version="0.1.0",
        abi_version=ABI_VERSION,
    )


def write_code(folder: Path, identity: CodeIdentity) -> None:
    library = write_file(folder / "model.so", LIBRARY)
    source = write_file(folder / "model.cpp", b"int f();")
    entry = CodeEntry(identity, library, source, "tiny", time.time())
    write_file(folder / "code.json", strict.to_json(entry).encode())


def weights_identity(checkpoint: str = "a") -> WeightsIdentity:
    digest = hashlib.sha256(checkpoint.encode()).hexdigest()
    return WeightsIdentity(digest, "1" * 64, "1")


def write_packed(folder: Path, identity: WeightsIdentity, data: bytes = b"weights") -> None:
    ref = write_weights(folder / "weights-00000.bin", [(64, data)], 4096, lambda n: None)
    entry = WeightsEntry(identity, 7, ref, "tiny", time.time())
    write_file(folder / "weights.json", strict.to_json(entry).encode())


def make_manifest(
    library: FileRef,
    weights: FileRef | None,
    code_key: str = "c" * 64,
    weights_key: str = "d" * 64,
) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        abi_version=ABI_VERSION,
        sinterlm_version="0.1.0",
        target="cpu",
        isa="generic",
        dtype="bf16",
        quantization=None,
        kv_cache_dtype="bf16",
        model="tiny",
        code_key=code_key,
        weights_key=weights_key,
        layout_hash=7,
        max_model_len=128,
        shape=ModelShape("LlamaForCausalLM", 32, 16, 2, 4, 2, 4, 24),
        constants=Constants(1e-5, 1e-5, 0.5, 1.0, (1.0, 0.1), (0, 0)),
        ops=(OpCost("embed_norm", -1, 64, 8, 0, 0, 16, 0, 0),),
        activation_bytes_per_token=640,
        activation_bytes_per_row=128,
        library=library,
        weights=weights,
        text=FileRef("text.json", len(TEXT), hashlib.sha256(TEXT).hexdigest()),
    )


def make_bundle(cache: Cache, source: str = "int f();", checkpoint: str = "a") -> Bundle:
    """A whole bundle through the cache, as ``compile_model`` would leave it."""
    code, packed, quiet = code_identity(source), weights_identity(checkpoint), Recorder()
    with (
        cache.entry(CODE, code.key, lambda f: write_code(f, code), quiet) as c,
        cache.entry(WEIGHTS, packed.key, lambda f: write_packed(f, packed), quiet) as w,
    ):
        library, weights = c.library, w.weights
    manifest = make_manifest(
        FileRef(f"../../code/{code.key}/{library.path}", library.nbytes, library.sha256),
        FileRef(f"../../weights/{packed.key}/{weights.path}", weights.nbytes, weights.sha256),
        code.key,
        packed.key,
    )
    return cache.publish(manifest, TEXT, quiet)
