"""The bound on bytes a second, on a clock of its own."""

from hypothesis import given
from hypothesis import strategies as st

from memory_agent.token_bucket import TokenBucket

BYTES_S = 1000.0


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_without_a_bound_nobody_waits() -> None:
    assert TokenBucket(None, Clock()).take(1 << 40) == 0.0


@given(st.lists(st.tuples(st.integers(0, 5000), st.floats(0.0, 3.0)), max_size=40))
def test_who_waits_as_told_keeps_the_bound(moves: list[tuple[int, float]]) -> None:
    """Whatever comes when: never more than the rate allows, but for a quarter of a second's worth and the last one."""
    clock = Clock()
    bucket = TokenBucket(BYTES_S, clock)
    moved, largest = 0, 0
    for count_bytes, pause_s in moves:
        moved, largest = moved + count_bytes, max(largest, count_bytes)
        assert moved <= BYTES_S * (clock.now_s + 0.25) + largest + 1e-6
        clock.now_s += bucket.take(count_bytes) + pause_s


def test_several_wait_for_each_other_s_bytes() -> None:
    clock = Clock()
    bucket = TokenBucket(BYTES_S, clock)
    waits = [bucket.take(500) for _ in range(4)]
    assert waits == [0.25, 0.75, 1.25, 1.75]
