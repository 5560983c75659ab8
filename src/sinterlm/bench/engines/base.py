"""What an engine is to a benchmark: how to find it, start it with its best flags, and ask it.

An adapter only describes; ``process`` starts and stops, ``sweep`` measures. Nothing here imports
an engine: each lives in an environment of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sinterlm.errors import UsageError


@dataclass(frozen=True)
class Weights:
    """One set of weights in the formats of ``sinterlm bench make-checkpoint``."""

    name: str
    folder: Path  #: holds hf/ and NAME-*.gguf

    @property
    def hf(self) -> Path:
        """The Hugging Face folder. Raises UsageError where it is missing."""
        return self._there(self.folder / "hf")

    def gguf(self, kind: str) -> Path:
        """The GGUF file of a format. Raises UsageError where it is missing."""
        found = sorted(self.folder.glob(f"*-{kind}.gguf"))
        return (
            found[0] if len(found) == 1 else self._there(self.folder / f"{self.name}-{kind}.gguf")
        )

    def _there(self, path: Path) -> Path:
        if not path.exists():
            raise UsageError(
                f"{path} is missing; run: sinterlm bench make-checkpoint {self.name} "
                f"--output {self.folder}"
            )
        return path


@dataclass(frozen=True)
class Seats:
    """What a server must have room for."""

    num_seqs: int  #: requests at once
    context: int  #: tokens of each, prompt and output

    @property
    def padded_context(self) -> int:
        """``context`` and some spare, a multiple of 64."""
        return -(-(self.context + 16) // 64) * 64


@dataclass(frozen=True)
class Variant:
    """One entry of an engine's flag grid."""

    name: str  #: "default", or what differs
    flags: tuple[str, ...] = ()


DEFAULT = Variant("default")


@dataclass(frozen=True)
class Launch:
    """A command that serves, and how to speak to what it starts."""

    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)  #: beside the caller's
    model: str = "bench"  #: name in requests
    extra_body: Mapping[str, Any] = field(default_factory=dict)  #: of every request
    reset_path: str | None = None  #: POST here empties the prefix cache
    url: str | None = None  #: of a server that somebody else started


class Engine(Protocol):
    """An adapter."""

    @property
    def name(self) -> str:
        """As it is called on the command line and in reports."""

    @property
    def precision(self) -> str:
        """Of weights: engines of one precision share a main table."""

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The flag grid, never empty; ours has one entry."""

    def missing(self) -> str | None:
        """Why it cannot run here, with the command that mends it; None = it can."""

    def versions(self) -> dict[str, str]:
        """Of the packages that matter."""

    def installed_bytes(self) -> int | None:
        """Of the packages it needs, the model left out; None = unknown."""

    def launch(self, weights: Weights, variant: Variant, port: int, seats: Seats) -> Launch:
        """How to start it. Raises UsageError for weights that are missing."""

    def cold_env(self, empty: Path) -> dict[str, str]:
        """Variables that move every cache into the empty folder; {} = it has none."""
