"""Times libraries in a process of its own, which a kernel may hang or end.

    python -m sinterlm.tune.worker        jobs as JSON lines on stdin, answers on stdout

A job is {"library", "max_tokens", "steps": [[tokens, rows], …], "train"}; its answer {"device",
"driver", "samples": [[µs, …], …]}, or {"error", "is_setup"}: whether it lies in driver, device or
memory, which no other candidate would help.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sinterlm.errors import BundleError, ResourceError, SinterError
from sinterlm.runtime.device import TimedLibrary, Train


def time_job(job: dict[str, Any]) -> dict[str, Any]:
    """The answer to one job."""
    try:
        with TimedLibrary(Path(job["library"]), job["max_tokens"]) as library:
            facts = library.describe()
            train = Train(**job["train"])
            samples = [library.time(0, tokens, rows, train) for tokens, rows in job["steps"]]
    except SinterError as exc:
        return {"error": str(exc), "is_setup": isinstance(exc, BundleError | ResourceError)}
    return {"device": facts["device"], "driver": facts["driver"], "samples": samples}


def main() -> int:
    """Answer every line of stdin."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a driver prints is no answer
    for line in sys.stdin:
        print(json.dumps(time_job(json.loads(line))), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
