"""What decides the bytes of each cached thing, and the keys made of it.

The code key knows shapes, layout and memory plan through the emitted source, and nothing of the
weights' values (but the scales of a KV cache in fp8, which stand in a GPU's launch table); the
weights key knows the checkpoint's content and the layout, and nothing of the compiler. So
fine-tunes of one shape share a library and never each other's weights.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from sinterlm.artifact.manifest import FileRef
from sinterlm.artifact.memo import digest_json


@dataclass(frozen=True)
class CodeIdentity:
    """All that decides the bytes of a library."""

    source_sha256: str  #: of the emitted source
    headers_sha256: str  #: of the kernel headers and ``abi.h``
    compiler: str
    flags: tuple[str, ...]
    target: str
    isa: str
    dtype: str
    sinterlm_version: str
    abi_version: int

    @property
    def key(self) -> str:
        """64 hex digits."""
        return digest_json(["code", dataclasses.asdict(self)])

    def same_but_compiler(self, other: CodeIdentity) -> bool:
        """Whether ``other`` is the same library by, perhaps, another compiler."""
        theirs = dataclasses.replace(other, compiler=self.compiler, flags=self.flags)
        return theirs == self


@dataclass(frozen=True)
class WeightsIdentity:
    """All that decides the bytes of a packed weights file."""

    checkpoint_digest: str  #: of the content of every tensor
    layout_sha256: str  #: of the weight layout as canonical text
    packer_version: str

    @property
    def key(self) -> str:
        """64 hex digits."""
        return digest_json(["weights", dataclasses.asdict(self)])


@dataclass(frozen=True)
class CodeEntry:
    """``code.json``."""

    identity: CodeIdentity
    library: FileRef
    source: FileRef
    model: str  #: the first model compiled to it, for people
    created: float  #: seconds since 1970


@dataclass(frozen=True)
class WeightsEntry:
    """``weights.json``."""

    identity: WeightsIdentity
    layout_hash: int
    weights: FileRef
    model: str
    created: float
