"""Clocks that stand still outside their variant's turns."""

import asyncio
import time

from benchmarks.elastic.turns import TurnClock


def test_a_clock_counts_its_turns_alone() -> None:
    """Time before, between and after turns does not pass."""
    clock = TurnClock()
    assert clock.now() == 0
    started = time.perf_counter()
    clock.start()
    time.sleep(0.02)
    clock.stop()
    turn = time.perf_counter() - started
    first = clock.now()
    time.sleep(0.05)
    assert 0.02 <= first <= turn
    assert clock.now() == first
    clock.start()
    assert clock.now() >= first


async def test_who_sleeps_wakes_in_a_turn() -> None:
    """A sleep whose time has come by the wall alone goes on until its clock has reached it."""
    clock = TurnClock()
    woken = asyncio.create_task(clock.sleep_until(0.05))
    clock.start()
    await asyncio.sleep(0.01)
    clock.stop()
    await asyncio.sleep(0.1)
    assert not woken.done()
    clock.start()
    await asyncio.wait_for(woken, 10)
    assert clock.now() >= 0.05


async def test_a_time_that_has_passed_needs_no_turn() -> None:
    """A request that is due already is sent even while its target is stopped: it is late by no second of its clock."""
    await asyncio.wait_for(TurnClock().sleep_until(0.0), 10)


async def test_an_idle_clock_jumps() -> None:
    """Nobody waits an hour for the next request of an idle variant; one that is busy is not hurried."""
    clock, busy = TurnClock(), True
    clock.idle = lambda: not busy
    clock.start()
    woken = asyncio.create_task(clock.sleep_until(3600.0))
    await asyncio.sleep(0.1)
    assert not woken.done()
    assert clock.now() < 3600
    busy = False
    await asyncio.wait_for(woken, 10)
    assert clock.now() >= 3600


async def test_a_clock_does_not_jump_outside_its_turns() -> None:
    clock = TurnClock()
    clock.idle = lambda: True
    woken = asyncio.create_task(clock.sleep_until(3600.0))
    await asyncio.sleep(0.1)
    assert not woken.done()
    clock.start()
    await asyncio.wait_for(woken, 10)
