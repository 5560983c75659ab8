"""``sinterlm serve`` whose engine waits before each step, and may die at one.

Usage: ``driver.py SECONDS STEP_TO_DIE_AT flags…``; step 0 = never.
"""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any

from sinterlm.cli import main
from sinterlm.engine.engine import Engine
from sinterlm.engine.outputs import Delta


def hinder(seconds: float, last: int) -> None:
    """Make every engine of this process slow and mortal."""
    step, numbers = Engine.step, itertools.count(1)

    def hindered(engine: Engine, **options: Any) -> list[Delta]:
        time.sleep(seconds)
        if next(numbers) == last:
            raise RuntimeError("/secret/path")
        return step(engine, **options)

    Engine.step = hindered  # type: ignore[method-assign]


if __name__ == "__main__":
    hinder(float(sys.argv[1]), int(sys.argv[2]))
    one_by_one = ["--stream-interval", "1"]  # else several steps share a wait
    sys.exit(main(["serve", *one_by_one, *sys.argv[3:]]))
