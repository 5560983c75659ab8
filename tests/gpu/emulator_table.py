"""What the emulator left beside what Triton's interpreter leaves of the same arguments, as rows of
a table; `make test-emu TABLE=docs/gpu.md` writes it between the markers there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sinterlm.backends.gpu.signatures import SIGNATURES
from sinterlm.ir.bf16 import from_bf16
from sinterlm.ir.fp8 import from_fp8

BEGIN, END = "<!-- emulator: make test-emu TABLE=docs/gpu.md -->", "<!-- /emulator -->"
#: What kernels keep to themselves.
_SCRATCH = ("parts", "counters", "part_o", "part_ml")


@dataclass
class Row:
    """All runs of one kernel in one case."""

    case: str
    kernel: str
    stored: str
    shape: str
    programs: int = 0
    seconds: float = 0.0
    error: float = 0.0  #: largest difference over the largest number, of the worst output


@dataclass
class Report:
    """The rows, in the order of the runs."""

    rows: dict[tuple[str, str, str, str], Row] = field(default_factory=dict)

    def add(self, new: Row) -> None:
        """A run."""
        key = (new.case, new.kernel, new.stored, new.shape)
        row = self.rows.setdefault(key, Row(*key))
        row.programs += new.programs
        row.seconds += new.seconds
        row.error = max(row.error, new.error)

    def write(self, path: Path) -> None:
        """Between the markers of ``path``. Raises ValueError where there are none."""
        head, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        _, end, tail = rest.partition(END)
        if not begin or not end:
            raise ValueError(f"{path} has no {BEGIN} … {END}")
        kernels = [*SIGNATURES, *(row.kernel for row in self.rows.values())]
        rows = sorted(self.rows.values(), key=lambda row: kernels.index(row.kernel))
        lines = [
            "| kernel | case | dtype | shape | programs | error | seconds |",
            "|---|---|---|---|---|---|---|",
            *(f"| {r.kernel} | {r.case} | {r.stored} | {r.shape} | {r.programs} | {r.error:.1e} | "
              f"{r.seconds:.1f} |" for r in rows),
        ]  # fmt: skip
        path.write_text(f"{head}{begin}\n" + "\n".join(lines) + f"\n{end}{tail}", encoding="utf-8")


def table_path() -> Path | None:
    """Where the table is wanted, if it is."""
    wanted = os.environ.get("EMULATOR_TABLE")
    return Path(wanted) if wanted else None


def error_of(
    name: str, constants: Mapping[str, Any], before: Mapping[str, Any], found: Mapping[str, Any],
    want: Mapping[str, Any],
) -> float:  # fmt: skip
    """The largest difference of an output over its largest number, of all that either wrote."""
    worst = 0.0
    for arg, kind in SIGNATURES[name].types(constants).items():
        if not kind.startswith("*") or arg in _SCRATCH:
            continue
        bits = [np.ascontiguousarray(held[arg]).view(np.uint8) for held in (before, found, want)]
        old, *new = (b.reshape(-1, found[arg].itemsize) for b in bits)
        written = np.logical_or.reduce([(b != old).any(-1) for b in new])
        if not written.any():
            continue
        a, b = (_numbers(held[arg], kind, arg, constants).ravel()[written]
                for held in (found, want))  # fmt: skip
        assert np.array_equal(np.isfinite(a), np.isfinite(b)), f"{name}: {arg}"
        a, b = a[np.isfinite(b)], b[np.isfinite(b)]
        if b.size:
            worst = max(worst, float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)))
    return worst


def _numbers(array: np.ndarray, kind: str, arg: str, constants: Mapping[str, Any]) -> np.ndarray:
    if kind == "*bf16":
        return from_bf16(array).astype("f8")
    if arg in ("k_base", "v_base"):
        return from_fp8(array, constants["KV_FP8"]).astype("f8")
    return array.astype("f8")


def stored_as(constants: Mapping[str, Any]) -> str:
    """The weights, and activations or pages where they are no bf16."""
    bits, group = constants.get("BITS", 16), constants.get("W_GROUP", 0)
    found = "bf16" if "BITS" in constants or "TILE" in constants else "fp32"
    if constants.get("FP8"):
        found = constants["FP8"] + (", blocks" if constants["W_SHARED"] else "")
        found += " × fp8" if constants["A_FP8"] else ""
    elif bits != 16:
        found = f"int{bits}" + (f", groups of {group}" if group else "")
        found += ", offsets" if constants["W_OFFSETS"] else ""
    elif constants.get("W_PITCH"):
        found += " in rows"
    return found + (f", {constants['KV_FP8']} pages" if constants.get("KV_FP8") else "")


def shape_of(args: Mapping[str, Any], constants: Mapping[str, Any]) -> str:
    """Rows × columns × depth; of attention sequences, heads and their size."""
    c = constants
    if "TILE" in c:
        keys = "+".join(map(str, args["context_lens"]))
        heads = f"{c['HKV']}×{c['GROUP']} heads of {c['D']}"
        return f"{keys} keys, {heads}, {c['SEGMENTS']} ranges"
    rows = args.get("num_tokens", args.get("num_rows"))
    if rows is None:
        rows = len(args["hidden"]) - 1 if "hidden" in args else len(args["slots"])  # one of poison
    columns = c.get("N") or c.get("VP") or (2 * c["F"] if "F" in c else None)
    if "GROUP" in c:
        columns = c["HKV"] * (c["GROUP"] + 2) * c["D"]
    depth = (c.get("K") or c.get("H")) if "BK" in c else None
    numbers = [rows, columns or c.get("H") or c.get("BLOCKS"), depth]
    split = f", {c['SPLIT']} splits" if c.get("SPLIT", 1) > 1 else ""
    return "×".join(str(n) for n in numbers if n) + split
