"""The process that times tiles for sinterlm tune, and what the journal keeps of it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sinterlm.backends.gpu.tuning import (
    read_tiles,
)
from sinterlm.errors import ResourceError
from sinterlm.runtime.device_probe import Step, Train
from sinterlm.tune.journal import Journal, Result
from sinterlm.tune.tasks import Trial, nothing
from sinterlm.tune.timer import TrialFailed, WorkerTimer

ANSWERS = """
import json, os, sys, time
for line in sys.stdin:
    job = json.loads(line)
    assert os.path.exists(job["library"])
    what = job["steps"][0]["step"]["tokens"] if job["steps"] else 1  # outputs are not looked at
    if what == 2: os._exit(9)
    if what == 3: time.sleep(60)
    if what == 4: answer = {"error": "an illegal address", "is_setup": False}
    elif what == 5: answer = {"error": "no HIP driver", "is_setup": True}
    else: answer = {"device": "d", "driver": str(os.getpid()), "samples": [[1.0]]}
    print(json.dumps(answer), flush=True)
"""


def test_a_lost_process_is_replaced() -> None:
    def steps(tokens: int) -> Trial:
        return replace(nothing(read_tiles("gfx942")), steps=((Step(tokens), Train(1, 0, 1, 1)),))

    with WorkerTimer(b"host", 5.0, (sys.executable, "-c", ANSWERS)) as timer:
        with pytest.raises(ResourceError, match="no HIP driver"):
            timer.time(steps(5), [])
        first = timer.time(steps(1), [])
        assert timer.time(steps(1), []) == first, "one process serves many"
        for what, why in ((2, "ended with 9"), (3, "not done within"), (4, "illegal address"),
                          (5, "no HIP driver")):  # fmt: skip
            with pytest.raises(TrialFailed, match=why):
                timer.time(steps(what), [])
            assert timer.time(steps(1), []).driver != first.driver


def test_a_result_is_one_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a/journal", "d")
    times = {"1": [3.0, 1.0, 2.0], "16": [4.0]}
    result = Result("k", "t", "measured", {"BN": 64}, times, device="d")
    journal.add(result)
    assert result.us == {"1": 2.0, "16": 4.0} and result.cost_us == pytest.approx(8**0.5)
    (line,) = (tmp_path / "a/journal").read_text().splitlines()
    assert Result(**json.loads(line)) == result == Journal(journal.path, "d").find("k")
