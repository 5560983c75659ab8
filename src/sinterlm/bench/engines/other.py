"""Engines we know nothing of: a server that runs already, any command, a container image."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sinterlm.bench.engines.base import DEFAULT, Launch, Seats, Variant, Weights
from sinterlm.errors import UsageError


@dataclass(frozen=True)
class Attached:
    """A server that somebody else started and stops; its memory and start-up are unknown."""

    name: str
    url: str
    precision: str = "unknown"
    variants: tuple[Variant, ...] = (DEFAULT,)

    def missing(self) -> str | None:
        """Whether it answers is found when it is asked."""
        return None

    def versions(self) -> dict[str, str]:
        """Where it is."""
        return {"url": self.url}

    def installed_bytes(self) -> int | None:
        """Unknown."""
        return None

    def launch(self, weights: Weights, variant: Variant, port: int, seats: Seats) -> Launch:
        """Nothing to start."""
        return Launch((), model="", url=self.url)

    def cold_env(self, empty: Path) -> dict[str, str]:
        """Not ours to move."""
        return {}


@dataclass(frozen=True)
class Command:
    """A command line with {port}, {hf}, {gguf_bf16}, {seqs} and {context} to fill in."""

    name: str
    template: str
    precision: str = "unknown"
    env: Mapping[str, str] = field(default_factory=dict)
    variants: tuple[Variant, ...] = (DEFAULT,)

    def missing(self) -> str | None:
        """Whether it runs is found when it is started."""
        return None

    def versions(self) -> dict[str, str]:
        """What is run."""
        return {"command": self.template}

    def installed_bytes(self) -> int | None:
        """Unknown."""
        return None

    def launch(self, weights: Weights, variant: Variant, port: int, seats: Seats) -> Launch:
        """The words, filled in. Raises UsageError for a name we do not fill in."""
        values = {"port": port, "seqs": seats.num_seqs, "context": seats.padded_context}
        for name in ("hf", "gguf_bf16", "gguf_q8_0", "gguf_q4_0"):
            if "{" + name + "}" in self.template:
                kind = name.removeprefix("gguf_")
                values[name] = weights.hf if name == "hf" else weights.gguf(kind)  # type: ignore[assignment]
        try:
            words = [word.format(**values) for word in shlex.split(self.template)]
        except (KeyError, IndexError, ValueError) as exc:
            raise UsageError(
                f"--engine {self.name}: {{{exc}}} is none of {{port}} {{hf}} {{gguf_bf16}} "
                "{gguf_q8_0} {gguf_q4_0} {seqs} {context}"
            ) from exc
        return Launch(tuple(words), self.env, model="")

    def cold_env(self, empty: Path) -> dict[str, str]:
        """Unknown."""
        return {}


def container(name: str, image: str, arguments: str) -> Command:
    """``docker run`` of an image by digest, with the weights mounted. Raises UsageError for a tag,
    which tomorrow may be another image."""
    if "@sha256:" not in image:
        raise UsageError(f"--engine {name}: {image} is a tag; name an image by digest, @sha256:...")
    template = (
        f"docker run --rm --network host -v {{hf}}:/model:ro {shlex.quote(image)} {arguments}"
    )
    return Command(name, template)
