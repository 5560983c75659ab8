"""The part of ``sinterlm inspect`` about GPUs: launches of a step, and their code objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sinterlm.commands.ui import print_table
from sinterlm.errors import BundleError

if TYPE_CHECKING:
    from sinterlm.backends.gpu.table import Table
    from sinterlm.commands.inspect import Subject

#: Facts of a code object that are shown; a checkpoint that is not compiled has none.
_SHOWN = ("num_warps", "registers", "shared_bytes", "spills", "occupancy", "matrix", "wide_loads")


def launch_facts(subject: Subject) -> dict[str, Any]:
    """Launches of a step, kernels by what they serve, scratch memory. Raises BundleError."""
    from sinterlm.backends.gpu.devices import DEVICES
    from sinterlm.backends.gpu.launch import launch_table
    from sinterlm.backends.gpu.library import archive_of
    from sinterlm.backends.gpu.objects import read_archive
    from sinterlm.backends.gpu.occupancy import programs_of
    from sinterlm.backends.gpu.tuning import MEASURED, read_tiles

    found: dict[int, dict[str, Any]] = {}
    if subject.bundle is not None:
        path = subject.bundle.library_path
        try:
            table, objects = read_archive(archive_of(path.read_bytes()))
        except ValueError as exc:
            raise BundleError(f"{path}: {exc}; compile the model again") from exc
        device = DEVICES[table.device]
        found = {
            o.kernel.id: {**{n: o.facts.get(n) for n in _SHOWN},
                          "programs_per_unit": programs_of(o, device)}
            for o in objects
        }  # fmt: skip
    else:
        assert subject.plan is not None
        table = launch_table(subject.plan, DEVICES[subject.target], subject.tiles)
    tuned = sum(kernel.source.startswith(MEASURED) for kernel in table.kernels)
    return {
        "device": table.device,
        "machines": DEVICES[table.device].machines,
        "tiles": f"tuned for {tuned} of {len(table.kernels)} kernels"
        if tuned
        else read_tiles(table.device).status,
        "per_step": table.per_step,
        "per_layer": sum(launch.layer == 0 for launch in table.launches),
        "kernels": [_kernel(table, i, found.get(i)) for i in range(len(table.kernels))],
        "vendor_gemm": _vendor_gemm(table),
        "scratch": [
            {"name": b.name, "unit": b.unit, "bytes": b.nbytes, "offset": b.offset}
            for b in table.buffers
        ],
    }


def _vendor_gemm(table: Table) -> dict[str, Any] | None:
    """What the vendor's library multiplies, and what our kernels do at any number of rows; None
    where it is not used."""
    from sinterlm.backends.gpu.devices import DEVICES
    from sinterlm.backends.gpu.vendor import LEAST_ROWS, LIBRARIES

    if not table.uses_vendor:
        return None
    many = {"T": LEAST_ROWS, "R": 1, "S": 1, "N": 0}
    kernels = table.launches_of(many, False)
    slots = dict.fromkeys(launch.slot.removesuffix(".product") for launch, k in kernels
                          if k.is_vendor)  # fmt: skip
    ours = dict.fromkeys(launch.slot for launch, k in kernels if "BITS" in k.constants)
    return {
        "library": LIBRARIES[DEVICES[table.device].vendor].name, "least_tokens": LEAST_ROWS,
        "launches": len(kernels), "gemms": list(slots), "ours": list(ours),
    }  # fmt: skip


def _kernel(table: Table, number: int, made: dict[str, Any] | None) -> dict[str, Any]:
    kernel = table.kernels[number]
    served = [c for c in table.choices if c.kernel == number]
    return {
        "id": number, "kernel": kernel.name, "slots": [c.slot for c in served],
        "most": [c.most for c in served], "unit": served[0].unit, "kind": served[0].kind,
        "grid": [str(axis) for axis in kernel.grid], "constants": kernel.constants,
        "options": kernel.options, "source": kernel.source, "object": made,
    }  # fmt: skip


def print_launches(facts: dict[str, Any]) -> None:
    """The table of kernels, on stdout."""
    from sinterlm.backends.gpu.vendor import VENDOR_GEMM

    rows = []
    for k in facts["kernels"]:
        tile = " ".join(f"{n}={k['constants'][n]}" for n in ("BM", "BN", "BK", "SPLIT", "TILE",
                        "SEGMENTS") if n in k["constants"])  # fmt: skip
        if k["kernel"] == VENDOR_GEMM:
            tile = " ".join(f"{n}={k['constants'][n]}" for n in ("N", "K"))
        most = "any" if not k["most"][0] else f"<= {k['most'][0]}"
        steps = k["kind"] if k["kind"] != "any" else f"{k['unit']} {most}"
        made = k["object"] or {}
        cells = [
            ", ".join(k["slots"]),
            steps,
            " x ".join(axis.replace("1/1*", "") for axis in k["grid"] if axis != "1/1*1"),
            tile,
            k["options"].get("num_warps", ""),
        ]
        if made:
            cells += [made["registers"], made["shared_bytes"], made["spills"],
                      ", ".join(made["matrix"]) or "none"]  # fmt: skip
        rows.append(cells)
    columns = ["launch", "steps", "grid", "tile", "warps"]
    if facts["kernels"][0]["object"]:
        columns += ["registers", "shared", "spills", "matrix instruction"]
    print_table(
        f"Launches on {facts['device']} ({facts['machines']}): {facts['per_step']} per step, "
        f"{facts['per_layer']} per layer; tiles {facts['tiles']}",
        columns, rows, right=range(4, 8),
    )  # fmt: skip
    vendor = facts["vendor_gemm"]
    if vendor:
        print(
            f"Steps of {vendor['least_tokens']} tokens and more: {vendor['launches']} launches; "
            f"{vendor['library']} multiplies {', '.join(vendor['gemms'])}, our kernels "
            f"{', '.join(vendor['ours'])}"
        )
