"""SinterLM itself: one set of flags for every batch size."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from sinterlm import __version__
from sinterlm.bench.engines.base import DEFAULT, Launch, Seats, Variant, Weights
from sinterlm.bench.engines.environment import closure_bytes, installed

#: Precision -> flags of ``sinterlm serve``.
PRECISIONS: dict[str, tuple[str, ...]] = {
    "bf16": ("--dtype", "bf16"),
    "fp32": ("--dtype", "fp32"),
    "int8": ("--quantization", "int8"),
    "int4": ("--quantization", "int4"),
}


@dataclass(frozen=True)
class SinterLM:
    """``sinterlm serve`` of this very installation."""

    precision: str

    @property
    def name(self) -> str:
        """``sinterlm:bf16`` and so on."""
        return f"sinterlm:{self.precision}"

    @property
    def variants(self) -> tuple[Variant, ...]:
        """One: what everybody gets."""
        return (DEFAULT,)

    def missing(self) -> str | None:
        """Never missing."""
        return None

    def versions(self) -> dict[str, str]:
        """Ours."""
        return {"sinterlm": __version__}

    def installed_bytes(self) -> int | None:
        """Of sinterlm and its dependencies, without extras."""
        return closure_bytes(installed(sys.path), "sinterlm")

    def launch(self, weights: Weights, variant: Variant, port: int, seats: Seats) -> Launch:
        """With room for every seat; development mode lets the prefix cache be emptied."""
        command = (
            sys.executable, "-m", "sinterlm", "serve", str(weights.hf), "--host", "127.0.0.1",
            "--port", str(port), "--served-model-name", "bench", "--max-num-seqs",
            str(seats.num_seqs), "--max-model-len", str(seats.padded_context),
            "--log-level", "warning", *PRECISIONS[self.precision], *variant.flags,
        )  # fmt: skip
        env = {"SINTERLM_SERVER_DEV_MODE": "1"}
        return Launch(command, env, reset_path="/reset_prefix_cache")

    def cold_env(self, empty: Path) -> dict[str, str]:
        """An empty cache of compiled code and packed weights."""
        return {"SINTERLM_CACHE_DIR": str(empty)}
