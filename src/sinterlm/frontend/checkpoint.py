"""Checkpoint: a model on disk (or made up) as a config, tensors by Hugging Face name, and text.

Its implementations are SafetensorsCheckpoint (``hf_directory``), GgufCheckpoint (``gguf``) and
DummyCheckpoint (``dummy``). A tensor nobody asked for is never read.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from sinterlm.artifact.progress import Progress
from sinterlm.artifact.text import TextAssets
from sinterlm.errors import CheckpointError
from sinterlm.frontend.numeric import STORAGE, Array, ReadDType
from sinterlm.ir.graph import DecoderConfig
from sinterlm.ir.quant import CodedMatrix, GemmFormat

#: Bytes handed to the digest at a time.
DIGEST_CHUNK = 8 << 20


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as stored. ``shape`` is Hugging Face's ([out, in] for matrices)."""

    shape: tuple[int, ...]
    dtype: str  #: "bf16", "fp16", "fp32", or a GGUF block type in lower case, e.g. "q4_1"
    nbytes: int  #: as stored


class Checkpoint(ABC):
    """A model to compile. Closing it releases its files; a later read opens them again."""

    name: str  #: what a user would call it
    path: Path | None  #: directory or file; None for dummy weights
    config: DecoderConfig
    tensors: dict[str, TensorInfo]  #: by Hugging Face name
    is_quantised = False  #: by a method whose floats no longer exist, not for a smaller file
    files: tuple[Path, ...]  #: all files the digest depends on (empty: it depends on none)

    @property
    def source_dtype(self) -> str:
        """dtype that holds most of the weights' bytes, e.g. "bf16" or "q4_1"."""
        sizes: Counter[str] = Counter()
        for info in self.tensors.values():
            sizes[info.dtype] += info.nbytes
        return sizes.most_common(1)[0][0] if sizes else "bf16"

    @property
    @abstractmethod
    def text(self) -> TextAssets:
        """Tokenizer, chat template and generation defaults; read when first asked for."""

    @abstractmethod
    def read(self, name: str, dtype: ReadDType) -> Array:
        """The tensor ``name``, C-contiguous: uint16 holding bf16 bits, or float32.

        May be a read-only view of the file. Raises CheckpointError for an unknown name.
        """

    def read_exact(self, name: str) -> Array:
        """The tensor without loss: bf16 bits where it is stored so, else float32."""
        return self.read(name, "bf16" if self._info(name).dtype == "bf16" else "fp32")

    @property
    def stored_formats(self) -> dict[str, GemmFormat]:
        """Matrices that are stored in codes which a GEMM can read as they are, with their format;
        ``read_coded`` gives these."""
        return {}

    def keeps(self, name: str, form: GemmFormat) -> bool:
        """Whether a matrix is stored in the codes of ``form``, whatever stands beside them."""
        stored = self.stored_formats.get(name)
        return stored is not None and form.holds_weights_of(stored)

    def read_coded(self, name: str, form: GemmFormat) -> CodedMatrix | None:
        """The codes of a matrix in ``form``, or None where it has to be quantised from floats."""
        return None

    def codes_for(self, dtype: ReadDType, *, are_asked: bool) -> dict[str, GemmFormat]:
        """``stored_formats`` where they count: if codes are asked for, and else if the checkpoint
        is of a quantisation method, whose 16-bit form they are. fp32 is the reference of every
        other form: there, codes become the floats that they stand for."""
        if are_asked or (self.is_quantised and dtype != "fp32"):
            return self.stored_formats
        return {}

    def kv_scales(self) -> tuple[tuple[float, float], ...]:
        """What numbers of k, and of v, are times in an fp8 KV cache, layer by layer: 1 where the
        checkpoint tells nothing, as in vLLM. Raises CheckpointError."""
        return ((1.0, 1.0),) * self.config.num_layers

    def origin(self, name: str, form: GemmFormat) -> str:
        """Where the codes of a matrix in ``form`` come from, if not from floats."""
        source = self._info(name).dtype
        if source in STORAGE:
            return ""
        return f"as stored ({source})" if self.keeps(name, form) else f"lossy from {source}"

    @abstractmethod
    def _stored_bytes(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes as stored, in pieces of at most DIGEST_CHUNK."""

    def digest(self, progress: Progress | None = None) -> str:
        """Hex SHA-256 over every tensor's name, shape, dtype and stored bytes.

        Independent of how tensors are spread over files. Reads all weights: callers memoise it by
        ``files``. ``progress`` receives a stage counted in bytes.
        """
        if progress is not None:
            total = sum(info.nbytes for info in self.tensors.values())
            progress.stage("hash checkpoint", total, "B")
        sha = hashlib.sha256(self._digest_prefix().encode())
        for name in sorted(self.tensors):
            info = self.tensors[name]
            entry = f"\n{name}\0{info.dtype}\0{info.shape}\0{info.nbytes}\0"
            sha.update(entry.encode(errors="surrogatepass"))  # JSON names can hold half a pair
            for piece in self._stored_bytes(name):
                sha.update(piece)
                if progress is not None:
                    progress.advance(len(piece))
        return sha.hexdigest()

    @property
    def whole(self) -> Checkpoint:
        """What this is one rank's part of; itself where it is no part."""
        return self

    def digest_from(self, whole_digest: str) -> str:
        """``digest``, where that of ``whole`` is known."""
        return whole_digest

    def _digest_prefix(self) -> str:
        """Whatever else decides what ``read`` returns for the same stored bytes."""
        return "tensors"

    @abstractmethod
    def close(self) -> None:
        """Release the files. May be called twice."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path or self.name}: there is no tensor {name!r}")
        return info
