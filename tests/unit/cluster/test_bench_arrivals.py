"""When requests are due: known before the run, from the seed alone."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from cluster.bench.arrivals import ClosedLoop, OpenLoop, Replay, due_times
from cluster.bench.errors import BenchError
from cluster.bench.workload import Request, random_workload


def requests(count: int) -> list[Request]:
    return list(random_workload(count, input_len=1, output_len=1).requests)


def at(*times_s: float | None) -> list[Request]:
    return [Request(i, np.zeros(1, np.int32), 1, time_s) for i, time_s in enumerate(times_s)]


@pytest.mark.parametrize(("burstiness", "spread"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_intervals_vary_as_their_gamma_distribution(burstiness: float, spread: float) -> None:
    """The coefficient of variation is 1 / sqrt(burstiness): 1 for Poisson, more when burstier."""
    gaps = np.diff([0.0, *due_times(OpenLoop(20.0, burstiness), requests(4000), seed=3)])
    assert gaps.std() / gaps.mean() == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize("burstiness", [0.5, 1.0, math.inf])
def test_the_last_request_is_due_at_count_over_rate(burstiness: float) -> None:
    """Whatever the distribution and the seed, the load offered is the rate."""
    for seed in range(3):
        assert due_times(OpenLoop(8.0, burstiness), requests(40), seed)[-1] == pytest.approx(5.0)


def test_the_seed_alone_decides_the_times() -> None:
    """Equal seeds give equal times, other seeds others."""
    first, again, other = (due_times(OpenLoop(5.0), requests(20), seed) for seed in (7, 7, 8))
    assert first == again
    assert first != other
    assert first == sorted(first)


def test_infinite_burstiness_is_a_constant_interval() -> None:
    """Every interval is 1 / rate."""
    assert due_times(OpenLoop(4.0, math.inf), requests(4), 0) == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_an_infinite_rate_sends_all_at_once() -> None:
    """Every request is due at the start."""
    assert due_times(OpenLoop(), requests(3), 0) == [0, 0, 0]


def test_a_replay_keeps_the_traces_times_divided_by_the_scale() -> None:
    """The first counted request is due at the start; scale 2 halves every interval."""
    assert due_times(Replay(2.0), at(10.0, 11.0, 15.0), 0) == [0.0, 0.5, 2.5]


def test_a_replay_without_times_is_refused_with_the_remedy() -> None:
    """Random requests carry no times."""
    with pytest.raises(BenchError, match="--request-rate"):
        due_times(Replay(), at(0.0, None), 0)


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda: OpenLoop(0.0), "--request-rate 0"),
        (lambda: OpenLoop(math.nan), "--request-rate nan"),
        (lambda: OpenLoop(1.0, 0.0), "--burstiness 0"),
        (lambda: Replay(0.0), "--time-scale 0"),
        (lambda: Replay(math.inf), "--time-scale inf"),
        (lambda: ClosedLoop(0), "--concurrency 0"),
    ],
)
def test_what_cannot_be_a_rate_is_refused_by_name(make: Callable[[], object], option: str) -> None:
    """The error names the option and its value."""
    with pytest.raises(BenchError, match=option):
        make()
