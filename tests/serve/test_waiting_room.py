"""Who finds a place, and when somebody who does not should come back."""

from __future__ import annotations

import pytest

from sinterlm.errors import QueueFullError
from sinterlm.serve.waiting_room import WaitingRoom


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def retry_after(room: WaitingRoom) -> int:
    with pytest.raises(QueueFullError, match="wait already") as caught:
        room.check()
    assert f"try again in {caught.value.retry_after_s} s" in str(caught.value)
    return caught.value.retry_after_s


def test_seats_and_waiting_places_are_one_count() -> None:
    room = WaitingRoom(2, 1)
    for _ in range(3):
        room.check()
        room.enter(1)
    retry_after(room)
    room.leave(1)
    room.check()


def test_a_request_of_many_sequences_needs_one_place() -> None:
    room = WaitingRoom(2, 0)
    room.enter(1)
    room.check()
    room.enter(8)
    assert room.num_inside == 9
    retry_after(room)


def test_nobody_waits_where_max_waiting_is_zero() -> None:
    room = WaitingRoom(1, 0)
    room.check()
    room.enter(1)
    retry_after(room)


def test_retry_after_follows_the_measured_pace() -> None:
    clock = Clock()
    room = WaitingRoom(1, 0, clock)
    room.enter(100)
    clock.now += 7
    assert retry_after(room) == 7  # nobody has left yet: as long again
    for _ in range(10):
        clock.now += 2
        room.leave(1)
    # 10 left in 27 s; the first one turned away came back and more follow in turn
    assert retry_after(room) == 3
    assert retry_after(room) == 6
    assert [retry_after(room) for _ in range(3)] == [9, 11, 14]
    room.leave(3)
    assert retry_after(room) == 7  # the third: 13 in 27 s
    clock.now += 10_000
    assert retry_after(room) == 60


def test_an_idle_hour_says_nothing_about_the_pace() -> None:
    clock = Clock()
    room = WaitingRoom(1, 0, clock)
    room.enter(1)
    room.leave(1)
    clock.now += 3600
    room.enter(2)
    clock.now += 1
    room.leave(1)
    assert retry_after(room) == 1
