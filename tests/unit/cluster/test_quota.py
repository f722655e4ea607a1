"""Quotas of a key: how much goes through in a minute, and when there is more."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.quota import KeyQuota


@dataclass(eq=False)
class Asked:
    tokens: int = 0


def test_without_bounds_everything_goes() -> None:
    """A key without quotas is never refused."""
    quota = KeyQuota(None, None, 0.0)
    assert all(quota.enter(0.0) is None for _ in range(1000))


@given(st.integers(1, 50), st.lists(st.floats(0, 5), max_size=200))
def test_no_minute_sees_more_than_twice_its_requests(per_min: int, pauses: list[float]) -> None:
    """Whatever the times, what enters within a minute is at most a full bucket and what comes in meanwhile."""
    quota, now_s, entered = KeyQuota(per_min, None, 0.0), 0.0, []
    for pause in pauses:
        now_s += pause
        if quota.enter(now_s) is None:
            entered.append(now_s)
    for begin in entered:
        assert sum(begin <= at < begin + 60 for at in entered) <= 2 * per_min


@pytest.mark.parametrize("per_min", [1, 7, 60, 1000])
def test_the_time_to_come_back_is_true(per_min: int) -> None:
    """Who comes again after the seconds that were named enters; the seconds are whole, and never none."""
    quota = KeyQuota(per_min, None, 0.0)
    assert [quota.enter(0.0) for _ in range(per_min)] == [None] * per_min
    refused = quota.enter(0.0)
    assert refused is not None
    what, wait_s = refused
    assert (what, wait_s >= 1) == ("requests", True)
    assert quota.enter(float(wait_s)) is None


def test_tokens_count_while_they_come() -> None:
    """A request that runs counts with what it has taken so far; what it took beyond the quota has to be earned."""
    quota, running = KeyQuota(None, 600, 0.0), Asked()
    assert quota.enter(0.0) is None
    quota.begins(running)
    running.tokens = 599
    assert quota.enter(0.0) is None
    running.tokens = 1200
    assert quota.enter(0.0) == ("tokens", 61)
    quota.ends(running, 0.0)
    assert quota.enter(0.0) == ("tokens", 61)
    assert quota.enter(60.0) is not None
    assert quota.enter(61.0) is None


def test_a_share_of_less_than_one_request_lets_one_in() -> None:
    """Where processes share a small quota each of them still takes a request now and then."""
    quota = KeyQuota(1 / 4, None, 0.0)
    assert quota.enter(0.0) is None
    assert quota.enter(0.0) == ("requests", 240)
    assert quota.enter(240.0) is None
