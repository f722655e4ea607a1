"""Requests that replicas die of."""

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
    suspects.died_with(asking(1, 2))
    assert suspects.why_refused(asking(1, 2)) is None
    suspects.died_with(asking(1, 2))
    clock.now += 100
    assert "2 replicas have died" in (suspects.why_refused(asking(1, 2)) or "")
    assert f"{REFUSED_S - 100:.0f} s more" in (suspects.why_refused(asking(1, 2)) or "")
    assert suspects.why_refused(asking(1, 2, 3)) is None
    clock.now += REFUSED_S
    assert suspects.why_refused(asking(1, 2)) is None


def test_a_token_clears_it() -> None:
    suspects = Suspects()
    for _ in range(DEATHS):
        suspects.died_with(asking(1))
    suspects.answered(asking(1))
    suspects.answered(asking(7))
    assert suspects.why_refused(asking(1)) is None
    assert len(suspects) == 0


def test_without_token_ids_nobody_is_suspected() -> None:
    suspects = Suspects()
    for _ in range(DEATHS):
        suspects.died_with(asking())
    assert suspects.why_refused(asking()) is None


def test_so_many_are_remembered_and_no_more() -> None:
    suspects = Suspects()
    for number in range(2000):
        suspects.died_with(asking(number))
    assert len(suspects) == 1024
    suspects.died_with(asking(1999))
    assert suspects.why_refused(asking(1999)) is not None
