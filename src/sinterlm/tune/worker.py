"""Times libraries in a process of its own, which a kernel may hang or end.

    python -m sinterlm.tune.worker        jobs as JSON lines on stdin, answers on stdout

A job is {"library", "steps": [{"step", "train"}, …], "pages", "outputs", "checked_rows",
"reference"}; its answer {"device", "driver", "samples": [[µs, …], …]}, or {"error",
"is_setup"}: whether it lies in driver, device or memory, which no other candidate would help. What
the outputs hold is kept in the file ``reference``, or held against it where there is one.
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
from sinterlm.runtime.device_probe import Step, TimedLibrary, Train


def time_job(job: dict[str, Any]) -> dict[str, Any]:
    """The answer to one job."""
    try:
        steps = [(Step(**one["step"]), Train(**one["train"])) for one in job["steps"]]
        with TimedLibrary(Path(job["library"]), [s for s, _ in steps], job["pages"]) as library:
            facts = library.describe()
            if steps:
                _check_outputs(library, job, steps[-1][0])
            samples = [library.time(0, step, train) for step, train in steps]
    except SinterError as exc:
        return {"error": str(exc), "is_setup": isinstance(exc, BundleError | ResourceError)}
    return {"device": facts["device"], "driver": facts["driver"], "samples": samples}


def _check_outputs(library: TimedLibrary, job: dict[str, Any], step: Step) -> None:
    """Raises RuntimeFault where those of ``step`` are not the reference's."""
    rows = min(step.rows or step.tokens, job["checked_rows"])
    names = [(name, kind, nbytes * rows) for name, kind, nbytes in job["outputs"]]
    found = {n: a.reshape(rows, -1) for n, a in library.outputs(0, step, names).items()}
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
    """Largest |found - want| of [rows, …] over its bound: two steps of bf16, and as much of the
    largest number of the row; inf for what is not finite."""
    if not (np.isfinite(found).all() and np.isfinite(want).all()):
        return float("inf")
    a, b = found.astype(np.float64), want.astype(np.float64)
    bound = 2.0**-7 * np.abs(b) + 2.0**-9 * np.abs(b).max(-1, keepdims=True) + 1e-30
    return float((np.abs(a - b) / bound).max())


def main() -> int:
    """Answer every line of stdin."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a driver prints is no answer
    for line in sys.stdin:
        print(json.dumps(time_job(json.loads(line))), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
