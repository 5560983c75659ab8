"""Tile choices: the JSON tables of ``tiles/``, those that ``sinterlm tune`` writes, and what
becomes of an entry at a real shape.

A shipped table holds starting points with their source; no device has measured any of them, and its
``status`` says so. An entry is cut down where a matrix is not a multiple of it. A tuned table holds
entries for the very kernels that were measured, and stands before the shipped one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sinterlm.errors import UsageError

#: What a GEMM's weights are stored in; and activations too, where both are fp8.
Stored = Literal["bf16", "codes", "fp8", "fp8-a8"]

_TABLES = Path(__file__).with_name("tiles")
#: Status of a table that ``sinterlm tune`` wrote.
TUNED = "tuned"
#: How the source of an entry begins that a device chose.
MEASURED = "measured on "
#: What the entries of GEMMs and of attention must say of their tiles; other kernels have other
#: words.
GEMM_TILE = ("BM", "BN", "BK", "GROUP_M", "MIN_PROGRAMS", "MAX_SPLIT")
ATTENTION_TILE = ("BM", "TILE", "SEGMENTS")
ATTENTION = ("attention", "attention_decode")
#: Constants of a GEMM or of attention that its tile decides, or that follow from both.
_TILE_CONSTANTS = ("BM", "BN", "BK", "SPLIT", "GROUP_M", "NUM_XCD", "CACHE", "DRAIN", "TILE",
                   "SEGMENTS")  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """How a kernel is cut for steps of at most ``max_rows`` rows (0 = any number)."""

    kernel: str
    max_rows: int
    tile: dict[str, int]
    options: dict[str, Any]  #: of the compiler
    source: str
    weights: Stored = "bf16"
    #: All other constants of the one kernel that was measured; None = it is for any.
    made_for: dict[str, Any] | None = None
    #: Microseconds, where measured, by rows; of attention by sequences x keys, or tokens.
    us: dict[str, float] = field(default_factory=dict)
    gb_per_s: dict[str, float] = field(default_factory=dict)  #: of weights, or of keys and values


@dataclass(frozen=True)
class TileTable:
    """All entries of a target; of two that fit as well the first counts."""

    target: str
    status: str
    entries: tuple[Entry, ...]
    device: str = ""  #: that was measured, as its driver calls it
    driver: str = ""
    date: str = ""  #: ISO 8601, of the last measurement

    def of(
        self, kernel: str, weights: Stored = "bf16", made_for: dict[str, Any] | None = None
    ) -> tuple[Entry, ...]:
        """The entries of a kernel for weights that are stored so, fewest rows first; the last one
        is for any number. One that was measured for ``made_for`` goes before one for any."""
        fits = [e for e in self.entries if (e.kernel, e.weights) == (kernel, weights)]
        found: dict[int, Entry] = {}
        for wanted in (made_for, None) if made_for is not None else (None,):
            for entry in fits:
                if entry.made_for == wanted:
                    found.setdefault(entry.max_rows, entry)
        return tuple(sorted(found.values(), key=lambda e: e.max_rows or 1 << 30))

    def over(self, other: TileTable) -> TileTable:
        """This one's entries before those of ``other``."""
        return TileTable(
            self.target, self.status, self.entries + other.entries, self.device, self.driver,
            self.date,
        )  # fmt: skip

    def to_json(self) -> str:
        """As the shipped tables are written: an entry a line."""
        head: dict[str, Any] = {"target": self.target, "status": self.status}
        if self.device:
            head |= {"device": self.device, "driver": self.driver, "date": self.date}
        lines = [json.dumps(_plain(entry)) for entry in self.entries]
        facts = "".join(f"  {json.dumps(k)}: {json.dumps(v)},\n" for k, v in head.items())
        return f'{{\n{facts}  "entries": [\n    ' + ",\n    ".join(lines) + "\n  ]\n}\n"


def _plain(entry: Entry) -> dict[str, Any]:
    """JSON form, without what an entry need not have."""
    found = {**vars(entry), "max_rows": entry.max_rows or None}
    spare = ("made_for", "us", "gb_per_s")
    return {name: value for name, value in found.items() if value or name not in spare}


def read_tiles(target: str) -> TileTable:
    """The shipped table of a target, which must be one of ``devices.DEVICES``."""
    return parse_tiles((_TABLES / f"{target}.json").read_text(encoding="utf-8"))


def tuned_path(cache: Path, target: str) -> Path:
    """Where ``sinterlm tune`` leaves its table, and ``sinterlm compile`` looks for one."""
    return cache / "tiles" / f"{target}.json"


def find_tiles(target: str, given: Path | None, cache: Path) -> TileTable:
    """The shipped table behind ``given``, or behind the tuned one in the ``cache`` if there is one.

    Raises UsageError for a file that is no such table, or that of another target.
    """
    shipped = read_tiles(target)
    path = given or tuned_path(cache, target)
    if given is None and not path.is_file():
        return shipped
    again = "give another --tiles" if given else "delete it, or run `sinterlm tune` again"
    try:
        table = parse_tiles(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise UsageError(f"cannot read the tile table {path}: {exc.strerror}; {again}") from exc
    except ValueError as exc:
        raise UsageError(f"{path} is no tile table: {exc}; {again}") from exc
    if table.target != target:
        raise UsageError(f"{path} has tiles for {table.target}, not for {target}; {again}")
    return table.over(shipped)


def parse_tiles(text: str) -> TileTable:
    """Inverse of ``to_json``. Raises ValueError naming what is wrong."""
    data = json.loads(text)
    if not isinstance(data, dict) or not isinstance(data.get("entries"), list):
        raise ValueError("there is no list of entries in it")
    names = ("target", "status", "device", "driver", "date")
    facts = {name: data[name] for name in names if name in data}
    for name in ("target", "status"):
        if name not in facts:
            raise ValueError(f"it has no {name}")
    if not all(isinstance(value, str) for value in facts.values()):
        raise ValueError(f"its {', '.join(facts)} must be texts")
    return TileTable(**facts, entries=tuple(map(_parse_entry, data["entries"])))


def _parse_entry(data: Any) -> Entry:
    """One entry. Raises ValueError."""
    try:
        entry = Entry(**{**data, "max_rows": data["max_rows"] or 0})
    except (TypeError, KeyError) as exc:
        raise ValueError(f"an entry is {str(data)[:80]}: {exc}") from exc
    tile, options = entry.tile, entry.options
    wrong = [
        name
        for held, names in ((tile, GEMM_TILE if "BK" in tile else ()),
                            (tile, ATTENTION_TILE if entry.kernel in ATTENTION else ()),
                            (options, ("num_warps", "num_stages")))
        for name in names
        if not isinstance(held.get(name), int) or held[name] < 1
    ]  # fmt: skip
    powers = ("BM", "BN", "BK", "MAX_SPLIT", "TILE")
    if entry.kernel == "attention" and tile.get("SEGMENTS") != 1:
        wrong.append("SEGMENTS")  # of a prompt, whose tiles have no place to leave them
    wrong += [n for n in powers if n in tile and tile[n] & (tile[n] - 1)]
    if wrong:
        raise ValueError(f"the entry of {entry.kernel} for {data['max_rows']} rows has no "
                         f"usable {', '.join(wrong)}")  # fmt: skip
    return entry


def made_for(constants: dict[str, Any]) -> dict[str, Any]:
    """What a GEMM or attention is compiled for beside its tile."""
    return {name: value for name, value in constants.items() if name not in _TILE_CONSTANTS}


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
