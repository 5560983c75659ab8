"""Times libraries in a process of its own, which a kernel may hang or end.

    python -m sinterlm.tune.worker        jobs as JSON lines on stdin, answers on stdout

A job is {"library", "max_tokens", "steps": [[tokens, rows], …], "train", "outputs", "reference"};
its answer {"device", "driver", "samples": [[µs, …], …]}, or {"error", "is_setup"}: whether it lies
in driver, device or memory, which no other candidate would help. What the outputs hold is kept in
the file ``reference``, or held against it where there is one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinterlm.errors import BundleError, ResourceError, RuntimeFault, SinterError
from sinterlm.runtime.device_probe import TimedLibrary, Train

#: Of a step, that outputs are held against the reference's.
_ROWS = 64


def time_job(job: dict[str, Any]) -> dict[str, Any]:
    """The answer to one job."""
    try:
        with TimedLibrary(Path(job["library"]), job["max_tokens"]) as library:
            facts = library.describe()
            train = Train(**job["train"])
            if job["steps"]:
                _check_outputs(library, job)
            samples = [library.time(0, tokens, rows, train) for tokens, rows in job["steps"]]
    except SinterError as exc:
        return {"error": str(exc), "is_setup": isinstance(exc, BundleError | ResourceError)}
    return {"device": facts["device"], "driver": facts["driver"], "samples": samples}


def _check_outputs(library: TimedLibrary, job: dict[str, Any]) -> None:
    """Raises RuntimeFault where they are not the reference's."""
    tokens, rows = job["steps"][-1]
    units = min(rows or tokens, _ROWS)
    names = [(name, kind, nbytes * units) for name, kind, nbytes in job["outputs"]]
    found = library.outputs(0, tokens, rows, names)
    path = Path(job["reference"])
    if not path.exists():
        new = path.with_suffix(".new")
        with new.open("wb") as file:
            np.savez(file, **found)  # type: ignore[arg-type]
        os.replace(new, path)
    with np.load(path) as reference:
        for name, array in found.items():
            share = error_share(array, reference[name])
            if not share <= 1:
                raise RuntimeFault(
                    f"{name} is off by {share:.3g} times the bound from the first candidate's"
                )


def error_share(found: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    """Largest |found - want| over its bound: two steps of bf16, and as much of the largest number;
    inf for what is not finite."""
    if not (np.isfinite(found).all() and np.isfinite(want).all()):
        return float("inf")
    a, b = found.astype(np.float64), want.astype(np.float64)
    bound = 2.0**-7 * np.abs(b) + 2.0**-9 * np.abs(b).max() + 1e-30
    return float((np.abs(a - b) / bound).max())


def main() -> int:
    """Answer every line of stdin."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a driver prints is no answer
    for line in sys.stdin:
        print(json.dumps(time_job(json.loads(line))), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
