"""Where a sweep ran and with what: machine, versions and sizes of engines, exact command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sinterlm.bench.engines.base import Engine
from sinterlm.bench.engines.environment import cpu_flags
from sinterlm.bench.raw import write_whole
from sinterlm.bench.setup import machine_facts

_INTERESTING = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")


@dataclass(frozen=True)
class EngineFacts:
    """One engine."""

    precision: str
    versions: Mapping[str, str]
    installed_bytes: int | None


@dataclass(frozen=True)
class SweepFacts:
    """The machine and everything installed on it that matters."""

    machine: Mapping[str, Any]
    isa: tuple[str, ...]  #: instruction sets that decide speed
    engines: Mapping[str, EngineFacts]
    commands: tuple[str, ...] = ()  #: each `bench sweep` that wrote into the folder
    dates: tuple[str, ...] = field(default=())  #: of those, UTC


def write_facts(folder: Path, engines: Mapping[str, Engine], words: Sequence[str]) -> None:
    """Write or complete ``facts.json``. Raises ResourceError on a full disk."""
    path = folder / "facts.json"
    before = read_facts(folder) if path.exists() else None
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    found = SweepFacts(
        asdict(machine_facts()),
        tuple(flag for flag in _INTERESTING if flag in cpu_flags()),
        {
            name: EngineFacts(engine.precision, engine.versions(), engine.installed_bytes())
            for name, engine in engines.items()
        },
        (*(before.commands if before else ()), shlex.join(words)),
        (*(before.dates if before else ()), now),
    )
    write_whole(path, json.dumps(asdict(found), indent=1) + "\n")


def read_facts(folder: Path) -> SweepFacts:
    """Inverse of ``write_facts``."""
    data = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    engines = {name: EngineFacts(**one) for name, one in data["engines"].items()}
    return SweepFacts(
        data["machine"], tuple(data["isa"]), engines, tuple(data["commands"]), tuple(data["dates"])
    )
