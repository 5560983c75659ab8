"""Tile choices: the JSON tables of ``tiles/``, and what becomes of an entry at a real shape.

A table holds starting points with their source; no device has measured any of them, and its
``status`` says so. An entry is cut down where a matrix is not a multiple of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

#: What a GEMM's weights are stored in; and activations too, where both are fp8.
Stored = Literal["bf16", "codes", "fp8", "fp8-a8"]

_TABLES = Path(__file__).with_name("tiles")


@dataclass(frozen=True)
class Entry:
    """How a kernel is cut for steps of at most ``max_rows`` rows (0 = any number)."""

    kernel: str
    max_rows: int
    tile: dict[str, int]
    options: dict[str, Any]  #: of the compiler
    source: str
    weights: Stored = "bf16"


@dataclass(frozen=True)
class TileTable:
    """All entries of a target."""

    target: str
    status: str
    entries: tuple[Entry, ...]

    def of(self, kernel: str, weights: Stored = "bf16") -> tuple[Entry, ...]:
        """The entries of a kernel for weights that are stored so, fewest rows first; the last one
        is for any number."""
        found = [e for e in self.entries if (e.kernel, e.weights) == (kernel, weights)]
        return tuple(sorted(found, key=lambda e: e.max_rows or 1 << 30))


def read_tiles(target: str) -> TileTable:
    """The table of a target, which must be one of ``devices.DEVICES``."""
    data = json.loads((_TABLES / f"{target}.json").read_text(encoding="utf-8"))
    entries = [Entry(**{**e, "max_rows": e["max_rows"] or 0}) for e in data["entries"]]
    return TileTable(data["target"], data["status"], tuple(entries))


def divisor(wanted: int, of: int) -> int:
    """The largest power of two that is at most ``wanted`` (one itself) and divides ``of``."""
    while of % wanted:
        wanted //= 2
    return wanted


def cut_gemm(
    entry: Entry,
    columns: int,
    depth: int,
    most_columns: int = 1 << 30,
    must_be_most: bool = False,
    most_depth: int = 1 << 30,
) -> dict[str, int]:
    """BM, BN, BK, SPLIT and GROUP_M of a GEMM of ``columns`` columns.

    BN divides ``columns`` and is at most (or just) ``most_columns``; BK divides ``depth`` and is at
    most ``most_depth``. The depth is split until a step of few rows has MIN_PROGRAMS programs, at
    most MAX_SPLIT times.
    """
    tile = entry.tile
    width = most_columns if must_be_most else divisor(min(tile["BN"], most_columns), columns)
    block = divisor(min(tile["BK"], most_depth), depth)
    split = 1
    while (
        columns // width * split < tile["MIN_PROGRAMS"]
        and split * 2 <= min(tile["MAX_SPLIT"], depth // block)
    ):  # fmt: skip
        split *= 2
    return {"BM": tile["BM"], "BN": width, "BK": block, "SPLIT": split, "GROUP_M": tile["GROUP_M"]}
