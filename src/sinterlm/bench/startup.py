"""From process start to the first token, everything included: cold (nothing compiled) and warm.

Cold means an empty cache of our own; what the operating system keeps of files stays kept.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from sinterlm.bench.results import StartupReport
from sinterlm.bench.setup import Tell, machine_facts
from sinterlm.errors import RuntimeFault


def measure_startup(
    words: Sequence[str], rounds: int, cache_parent: Path | None, tell: Tell
) -> StartupReport:
    """Run ``sinterlm run`` with ``words`` (model and flags), ``rounds`` times cold and warm.

    Each round has a new cache folder, under ``cache_parent`` or the system's place for temporary
    files. Raises RuntimeFault with the command's own message when it fails.
    """
    command = [sys.executable, "-m", "sinterlm", "run", *words]
    command += ["--prompt", "Hello", "--max-tokens", "1"]
    cold, warm = [], []
    for number in range(rounds):
        with tempfile.TemporaryDirectory(prefix="sinterlm-bench-", dir=cache_parent) as cache:
            tell(f"round {number + 1}/{rounds}, cold")
            cold.append(first_token_seconds(command, cache))
            tell(f"round {number + 1}/{rounds}, warm")
            warm.append(first_token_seconds(command, cache))
    return StartupReport(machine_facts(), command[1:], cold, warm, median(cold), median(warm))


def first_token_seconds(command: Sequence[str], cache: str) -> float:
    """Seconds from starting ``command`` to the first byte of its answer. Raises RuntimeFault."""
    env = {**os.environ, "SINTERLM_CACHE_DIR": cache}
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=env
        ) as child:
            assert child.stdout is not None
            first = child.stdout.read(1)
            took = time.perf_counter() - start
            child.stdout.read()
        if child.returncode != 0 or not first:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().removeprefix("sinterlm: error: ")
            raise RuntimeFault(f"`sinterlm run` ended with {child.returncode}: {said}")
    return took
