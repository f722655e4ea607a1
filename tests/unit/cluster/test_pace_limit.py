"""The limit that keeps the TPOT: found, given up, taken back."""

import math
from collections.abc import Callable

from cluster.pace_limit import PaceLimit

TARGET_S = 0.040


def play(limit: PaceLimit, tpot_s: Callable[[int], float], wanted: int, begin_s: float, seconds: int) -> list[int]:
    """Requests inside by second: as many as wanted and allowed, of which a tenth ends each quarter second."""
    inside, seen = min(wanted, limit.limit), []
    for tick in range(4 * seconds):
        now_s = begin_s + tick / 4
        limit.want(TARGET_S, now_s)
        limit.add(inside * 0.25, round(inside * 0.25 / tpot_s(int(inside))))
        inside = max(min(wanted, limit.limit), 0.9 * inside)
        if limit.is_due(now_s):
            limit.judge(int(inside), now_s)
            seen.append(int(inside))
    return seen


def test_as_many_as_keep_the_target() -> None:
    """With 10 ms and 0.5 ms a request, 60 keep 40 ms: the number stays around that, whatever is offered."""
    seen = play(PaceLimit(2), lambda inside: 0.010 + 0.0005 * inside, wanted=300, begin_s=0.0, seconds=60)
    assert all(35 <= inside <= 75 for inside in seen[20:])
    assert sum(seen[20:]) / 40 > 48


def test_no_limit_where_the_target_is_kept() -> None:
    """A fast engine is not limited at all."""
    limit = PaceLimit(2)
    assert set(play(limit, lambda inside: 0.001, wanted=300, begin_s=0.0, seconds=20)) == {300}
    assert limit.limit == math.inf


def test_more_is_let_in_again_when_it_is_faster() -> None:
    """A limit that was right grows when the engine keeps the target with more."""
    limit = PaceLimit(2)
    play(limit, lambda inside: 0.010 + 0.001 * inside, wanted=300, begin_s=0.0, seconds=40)
    assert limit.limit < 60
    assert play(limit, lambda inside: 0.010, wanted=300, begin_s=40.0, seconds=60)[-1] == 300


def test_a_target_that_nobody_can_keep_does_not_stop_everybody() -> None:
    """Where one request a replica is too slow already, the limit is lifted instead of held at the least."""
    seen = play(PaceLimit(2), lambda inside: 0.5, wanted=100, begin_s=0.0, seconds=60)
    assert seen.count(100) > 30


def test_a_target_that_is_asked_for_no_more_is_forgotten() -> None:
    """Requests of a patient class alone are not held to the target of another that came an hour ago."""
    limit = PaceLimit(2)
    limit.want(TARGET_S, 0.0)
    for second in range(3600, 3620):
        limit.want(1.0, second)
        limit.add(100.0, 1000)  # 100 ms
        limit.judge(100, second)
    assert limit.limit == math.inf
