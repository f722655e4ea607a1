"""Whether there is room, by what an ingress sees."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.room import Room


def room(**changes: float) -> Room:
    return Room(**({"patience_s": 0.5, "seqs": 4, "replicas": 2} | changes))  # type: ignore[arg-type]


@dataclass(eq=False)
class Request:
    prompt_tokens: int = 100
    tokens: int = 1


def fill(one: Room, requests: int, now_s: float = 0.0) -> list[Request]:
    """So many requests, each with its first token."""
    made = [Request() for _ in range(requests)]
    for request in made:
        one.sent(request, now_s)
        one.began(request, now_s + 0.001)
    return made


def send(one: Room, *prompts: int, now_s: float) -> list[Request]:
    """Requests with prompts of so many tokens, which wait."""
    made = [Request(tokens) for tokens in prompts]
    for request in made:
        one.sent(request, now_s)
    return made


def compute(one: Room, tokens_per_s: int) -> None:
    """Ten prompts in the first second, one after the other, each with its first token a tenth of a second later."""
    for at in range(10):
        (request,) = send(one, tokens_per_s // 10, now_s=at / 10)
        one.began(request, (at + 1) / 10)


def test_places_are_what_the_replicas_run() -> None:
    """Two replicas of four requests have room for eight, and for none while nobody leaves."""
    one = room()
    fill(one, 7)
    assert one.has_room(1, 1.0) and not one.has_room(2, 1.0)
    fill(one, 1)
    assert not one.has_room(1, 1.0)


def test_one_more_enters_where_a_place_is_about_to_be_free() -> None:
    """At ten ends a second the next place is free within the patience: engines do not run dry while one is sent."""
    one = room()
    there = fill(one, 8)
    for at in range(20):
        one.ended(there.pop(0), at / 10)
        there += fill(one, 1, at / 10)
    assert one.has_room(1, 2.0) and not one.has_room(8, 2.0)


def test_ends_without_overload_open_no_door() -> None:
    """That many short requests have ended while there were places says nothing of when the next one is free."""
    one = room()
    for at in range(50):
        one.ended(*fill(one, 1, at / 50), at / 50)
    fill(one, 8, 1.0)
    assert not one.has_room(1, 1.01)


def test_prompts_that_wait_longer_than_the_patience_keep_others_out() -> None:
    """1,000 prompt tokens a second: 400 before it are fine, 600 are not; one a replica is always let in."""
    one = room(seqs=100)
    compute(one, tokens_per_s=1000)
    send(one, 200, 200, now_s=1.0)
    assert one.has_room(1, 1.0)
    send(one, 200, now_s=1.0)
    assert not one.has_room(1, 1.0)
    slow = room()
    send(slow, 5000, now_s=0.0)
    assert slow.has_room(1, 1.0)


def test_engines_that_stand_still_are_full() -> None:
    """When first tokens stop coming there is no room, however fast they came before."""
    one = room(seqs=100)
    compute(one, tokens_per_s=10_000)
    send(one, 1000, 1000, 1000, now_s=1.0)
    assert one.has_room(1, 1.0)
    assert not one.has_room(1, 2.9)


def test_one_that_is_overtaken_is_nobodys_obstacle() -> None:
    """A replica that is stuck with three prompts does not close the door of the other, where a later one has begun."""
    one = room(seqs=100)
    compute(one, tokens_per_s=1000)
    stuck = send(one, 1000, 1000, 1000, now_s=1.0)
    assert not one.has_room(1, 1.5)
    (quick,) = send(one, 100, now_s=1.5)
    one.began(quick, 1.6)
    assert one.has_room(1, 1.6)
    one.ended(stuck[1], 1.7)
    one.began(stuck[0], 1.8)
    assert (one.inside, one.pending) == (13, 1)


def test_one_that_waits_for_very_long_is_nobodys_obstacle() -> None:
    """Though nobody has overtaken it: it lacks memory, or its replica has died unseen."""
    one = room(seqs=100)
    compute(one, tokens_per_s=1000)
    stuck = send(one, 1000, 1000, 1000, now_s=1.0)
    assert not one.has_room(1, 2.5)
    assert one.has_room(1, 3.5)
    one.began(stuck[0], 4.0)
    one.ended(stuck[1], 4.0)
    assert (one.inside, one.pending) == (12, 1)


def test_without_replicas_there_is_no_room() -> None:
    """And there is again when one comes."""
    one = room(replicas=0)
    assert not one.has_room(1, 0.0)
    one.resize(1, 0, 0.0)
    assert one.has_room(1, 0.0)


def test_a_request_larger_than_all_enters_when_nobody_is_there() -> None:
    """Twenty answers at once fit nowhere, and must not wait for ever."""
    one = room()
    assert one.has_room(20, 0.0)
    fill(one, 1)
    assert not one.has_room(20, 0.0)


@pytest.mark.parametrize(("all_requests", "places"), [(0, 8), (4, 8), (6, 6), (100, 4)])
def test_ingresses_share_the_places(all_requests: int, places: int) -> None:
    """Each of two has half of eight for certain, and more while the other leaves it."""
    one = room(ingresses=2)
    fill(one, 4)
    one.resize(2, all_requests, 0.0)
    assert one.limit == places


def test_a_tpot_that_is_too_long_lets_fewer_in() -> None:
    """Eight at 100 ms a token, with a target of 50: those that leave are not all replaced."""
    one = room()
    one.want(0.05, 0.0)
    there = fill(one, 8)
    for second in range(1, 4):
        for request in there:
            request.tokens += 10
        one.resize(2, 8, float(second))
    one.ended(there[0], 4.0)
    assert one.limit < 7 and not one.has_room(1, 4.0)


def test_requests_that_have_stalled_say_nothing_of_the_pace() -> None:
    """Four get a token each 20 ms, four none at all, with a target of 30: nobody is kept out for that."""
    one = room(seqs=100)
    one.want(0.03, 0.0)
    there = fill(one, 8)
    for second in range(1, 20):
        for request in there[:4]:
            request.tokens += 50
        one.resize(2, 8, float(second))
    assert one.limit == 200


@given(st.lists(st.tuples(st.sampled_from(["sent", "began", "ended", "left"]), st.integers(0, 500)), max_size=80))
def test_counts_are_right_at_every_moment(events: list[tuple[str, int]]) -> None:
    """Whatever happens in whatever order, what is inside is what was sent and has not ended."""
    one, waiting, decoding = room(), list[Request](), list[Request]()
    for number, (event, tokens) in enumerate(events):
        now_s = number / 10
        if event == "sent":
            waiting += send(one, tokens, now_s=now_s)
        elif event == "began" and waiting:
            decoding.append(waiting.pop(tokens % len(waiting)))
            one.began(decoding[-1], now_s)
        elif event == "ended" and decoding:
            one.ended(decoding.pop(), now_s)
        elif event == "left" and waiting:
            one.ended(waiting.pop(tokens % len(waiting)), now_s)
        assert (one.inside, one.pending) == (len(waiting) + len(decoding), len(waiting))
        one.has_room(1, now_s)
    for request in waiting + decoding:
        one.ended(request, 1000.0)
    assert (one.inside, one.pending, one.has_room(8, 1000.0)) == (0, 0, True)
