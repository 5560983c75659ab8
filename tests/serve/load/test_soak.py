"""500 connections for a while, a third of them dropped: nothing is lost, wrong, or left behind.

``SOAK_SECONDS`` says for how long: a minute, or five by ``make soak``.
"""

from __future__ import annotations

import asyncio
import collections
import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from tests.serve.load.client import Case, Outcome, alone, cases, stream
from tests.serve.load.process import ServerProcess, running

pytestmark = pytest.mark.slow

CONNECTIONS = 500
SECONDS = float(os.environ.get("SOAK_SECONDS", "60"))
#: The longest a client that leaves by the clock waits, seconds.
PATIENCE_S = 20.0


@dataclass
class Tally:
    """What the clients saw, and what the process held, a sample a second."""

    complete: int = 0
    dropped: int = 0
    dropped_within: int = 0  #: of these, after their first token
    faults: list[str] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)

    def take(self, outcome: Outcome, expected: Outcome, was_dropped: bool) -> None:
        """Judge one stream."""
        if outcome.status not in (0, 200) or outcome.error is not None:
            self.faults.append(f"status {outcome.status}: {outcome.error}")
        elif outcome.tokens != expected.tokens[: len(outcome.tokens)]:
            self.faults.append(f"tokens {outcome.tokens} instead of {expected.tokens}")
        elif outcome.is_done:
            self.complete += 1
            if (outcome.tokens, outcome.reason) != (expected.tokens, expected.reason):
                self.faults.append(f"ended early: {outcome} instead of {expected}")
        elif was_dropped:
            self.dropped += 1
            self.dropped_within += bool(outcome.tokens)
        else:
            self.faults.append(f"neither complete nor dropped: {outcome}")


async def client(
    port: int, known: Sequence[Case], expected: Sequence[Outcome], tally: Tally, seed: int
) -> None:
    """One connection after the other until the time is over."""
    draw = random.Random(seed)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        which = draw.randrange(len(known))
        leaves = draw.random() < 1 / 3
        by_clock = leaves and draw.random() < 0.5  # mostly while it waits; else within an answer
        length = len(expected[which].tokens)
        try:
            outcome = await stream(
                port,
                known[which],
                drop_after_s=draw.uniform(0.0, PATIENCE_S) if by_clock else None,
                drop_after_tokens=draw.randrange(1, length) if leaves and not by_clock else None,
            )
        except (OSError, ValueError, IndexError) as error:
            tally.faults.append(f"{type(error).__name__}: {error}")
            continue
        tally.take(outcome, expected[which], leaves)


async def watch(server: ServerProcess, tally: Tally) -> None:
    """A sample of the process's memory each second."""
    while True:
        tally.rss.append(server.rss())
        await asyncio.sleep(1.0)


async def soak(server: ServerProcess, known: Sequence[Case], expected: Sequence[Outcome]) -> Tally:
    """All clients at once, until each has ended."""
    tally = Tally()
    watching = asyncio.create_task(watch(server, tally))
    clients = (client(server.port, known, expected, tally, seed) for seed in range(CONNECTIONS))
    await asyncio.gather(*clients)
    watching.cancel()
    return tally


def test_load() -> None:
    known = cases(12)
    with running("--max-model-len", "1024", "--log-level", "warning") as server:
        expected = alone(server, known)
        server.wait_until_idle()
        threads, sockets = server.threads(), server.sockets()
        tally = asyncio.run(soak(server, known, expected))
        engine = server.wait_until_idle()
        print(
            f"{CONNECTIONS} connections, {SECONDS:g} s: {tally.complete} complete, "
            f"{tally.dropped} dropped ({tally.dropped_within} within an answer), "
            f"{engine['generation_tokens_total']} tokens, RSS {tally.rss[-1] / 1e6:.0f} MB"
        )
        assert collections.Counter(tally.faults) == {}
        assert tally.complete > 50, "too few to say anything"
        assert tally.dropped_within > 20
        assert engine["requests_finished"]["error"] == 0
        assert server.threads() == threads
        deadline = time.monotonic() + 10
        while server.sockets() > sockets:
            assert time.monotonic() < deadline, f"{server.sockets()} sockets, {sockets} before"
            time.sleep(0.1)
        assert_flat(tally.rss)
        assert [o.tokens for o in alone(server, known)] == [o.tokens for o in expected]
        assert server.stop() == 0, server.log.read_text()


def assert_flat(rss: Sequence[int]) -> None:
    """After a warm-up of 40 % of the time memory stays within 2 % and 4 MB."""
    settled = rss[len(rss) * 2 // 5 :]
    half = len(settled) // 2
    before, after = statistics.median(settled[:half]), statistics.median(settled[half:])
    assert after <= before * 1.02 + 4e6, f"RSS grew from {before / 1e6:.1f} to {after / 1e6:.1f} MB"
