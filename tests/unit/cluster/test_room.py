"""Whether there is room, by what an ingress sees."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.room import Room


def room(**changes: float) -> Room:
    return Room(**({"patience_s": 0.5, "seqs": 4, "replicas": 2} | changes))  # type: ignore[arg-type]


def fill(one: Room, requests: int, now_s: float = 0.0, tokens: int = 100) -> None:
    """So many requests, each with its first token."""
    for _ in range(requests):
        one.sent(tokens, now_s)
        one.began(tokens, now_s + 0.001)


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
    fill(one, 8)
    for at in range(20):
        one.ended(100, has_begun=True, now_s=at / 10)
        fill(one, 1, at / 10)
    assert one.has_room(1, 2.0) and not one.has_room(8, 2.0)


def test_ends_without_overload_open_no_door() -> None:
    """That many short requests have ended while there were places says nothing of when the next one is free."""
    one = room()
    for at in range(50):
        fill(one, 1, at / 50)
        one.ended(100, has_begun=True, now_s=at / 50)
    fill(one, 8, 1.0)
    assert not one.has_room(1, 1.01)


def test_prompts_that_wait_longer_than_the_patience_keep_others_out() -> None:
    """1,000 prompt tokens a second: 400 before it are fine, 600 are not; one a replica is always let in."""
    one = room(seqs=100)
    for at in range(10):
        one.sent(100, at / 10)
        one.began(100, (at + 1) / 10)
    one.sent(200, 1.0)
    one.sent(200, 1.0)
    assert one.has_room(1, 1.0)
    one.sent(200, 1.0)
    assert not one.has_room(1, 1.0)
    slow = room()
    slow.sent(5000, 0.0)
    assert slow.has_room(1, 100.0)


def test_engines_that_stand_still_are_full() -> None:
    """When first tokens stop coming there is no room, however fast they came before."""
    one = room(seqs=100)
    for at in range(10):
        one.sent(100, at / 10)
        one.began(100, (at + 1) / 10)
    for _ in range(3):
        one.sent(100, 1.0)
    assert one.has_room(1, 1.0)
    assert not one.has_room(1, 10.0)


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
    fill(one, 8)
    for second in range(1, 4):
        one.tokens += 80
        one.resize(2, 8, float(second))
    one.ended(100, has_begun=True, now_s=4.0)
    assert one.limit < 7 and not one.has_room(1, 4.0)


@given(st.lists(st.tuples(st.sampled_from(["sent", "began", "ended", "left"]), st.integers(0, 500)), max_size=80))
def test_counts_are_right_at_every_moment(events: list[tuple[str, int]]) -> None:
    """Whatever happens in whatever order, what is inside is what was sent and has not ended."""
    one, waiting, decoding = room(), list[int](), list[int]()
    for at, (event, tokens) in enumerate(events):
        now_s = at / 10
        if event == "sent":
            one.sent(tokens, now_s)
            waiting.append(tokens)
        elif event == "began" and waiting:
            decoding.append(waiting.pop(0))
            one.began(decoding[-1], now_s)
        elif event == "ended" and decoding:
            one.ended(decoding.pop(), True, now_s)
        elif event == "left" and waiting:
            one.ended(waiting.pop(), False, now_s)
        assert one.inside == len(waiting) + len(decoding)
        assert (one.pending, one.pending_tokens) == (len(waiting), sum(waiting))
        one.has_room(1, now_s)
