"""Requests that replicas die of."""

import asyncio

from vllm.v1.engine import EngineCoreRequest

from cluster.suspects import DEATHS, REFUSED_S, Suspects
from tests.unit.cluster.fake_replicas import request


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def asking(*prompt: int) -> EngineCoreRequest:
    one = request()
    one.prompt_token_ids = list(prompt)
    return one


def test_it_is_refused_after_the_second_death_for_a_while() -> None:
    """Whoever asks for the same, and nobody else."""
    clock = Clock()
    suspects = Suspects(clock)
    assert not suspects.died_with(asking(1, 2), 1, "a", 1)
    assert suspects.why_refused(asking(1, 2)) is None
    assert suspects.died_with(asking(1, 2), 2, "b", 1)
    clock.now += 100
    assert "2 replicas have died" in (suspects.why_refused(asking(1, 2)) or "")
    assert f"{REFUSED_S - 100:.0f} s more" in (suspects.why_refused(asking(1, 2)) or "")
    assert suspects.why_refused(asking(1, 2, 3)) is None
    clock.now += REFUSED_S
    assert suspects.why_refused(asking(1, 2)) is None


def test_a_token_clears_it() -> None:
    suspects = Suspects()
    for death in range(DEATHS):
        suspects.died_with(asking(1), death + 1, f"r{death}", 1)
    suspects.answered(asking(1))
    suspects.answered(asking(7))
    assert suspects.why_refused(asking(1)) is None
    assert len(suspects) == 0


def test_without_token_ids_nobody_is_suspected() -> None:
    suspects = Suspects()
    for death in range(DEATHS):
        suspects.died_with(asking(), death + 1, f"r{death}", 1)
    assert suspects.why_refused(asking()) is None


def test_so_many_are_remembered_and_no_more() -> None:
    suspects = Suspects()
    for number in range(2000):
        suspects.died_with(asking(number), 1, f"r{number}", 1)
    assert len(suspects) == 1024
    suspects.died_with(asking(1999), 2, "last", 1)
    assert suspects.why_refused(asking(1999)) is not None


def test_who_waited_beside_others_is_refused_after_a_third_death() -> None:
    """What is said first of a replica counts: those that hear of its death later find fewer beside them."""
    suspects = Suspects()
    for deaths, replica in enumerate("ab", 1):
        assert [suspects.died_with(asking(one), deaths, replica, 3 - one) for one in range(3)] == [False] * 3
    assert [suspects.why_refused(asking(one)) for one in range(3)] == [None] * 3
    suspects.answered(asking(0))
    assert suspects.died_with(asking(1), 3, "c", 2)
    assert suspects.why_refused(asking(1)) is not None
    assert suspects.why_refused(asking(0)) is suspects.why_refused(asking(2)) is None


def test_one_death_counts_once_for_a_prompt_that_many_ask() -> None:
    suspects = Suspects()
    for replica in "ab":
        assert not any(suspects.died_with(asking(1), 1, replica, 5) for _ in range(5))
    assert suspects.died_with(asking(1), 1, "c", 5)


async def test_suspects_are_tried_one_after_the_other() -> None:
    """The next one begins when the one before has a token, or has ended; others do not wait."""
    suspects, under_way, ended = Suspects(), [], []
    done = {name: asyncio.Event() for name in "xyz"}

    async def attempt(name: str, deaths: int) -> None:
        one = request(name)
        async with suspects.in_turn(one, deaths):
            under_way.append(name)
            await done[name].wait()
            ended.append(name)

    tasks = [asyncio.create_task(attempt(name, DEATHS if name != "z" else 1)) for name in "xyz"]
    await asyncio.sleep(0.01)
    assert under_way == ["x", "z"]
    suspects.answered(request("x"))
    await asyncio.sleep(0.01)
    assert under_way == ["x", "z", "y"] and ended == []
    for event in done.values():
        event.set()
    await asyncio.gather(*tasks)
    await asyncio.wait_for(attempt("x", DEATHS), 1)  # nobody has the turn any more
    given_up = asyncio.create_task(attempt("y", DEATHS))
    given_up.cancel()
    await asyncio.wait_for(attempt("x", DEATHS), 1)
