"""How policies rank replicas."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.bench.report import Slo
from cluster.fleet_view import FleetView
from cluster.prediction import Predictor, Traffic
from cluster.prefix_index import PrefixIndex
from cluster.routing_policy import (
    LlmD,
    Llumnix,
    Load,
    PowerOfTwo,
    PredictedLatency,
    Random,
    RayPrefix,
    RoundRobin,
    RouteRequest,
    RoutingPolicy,
)
from memory_agent.reports import PressureLevel
from replicas.step_time import StepTime

NOW_S = 100.0
STEP = StepTime(step_s=0.01, row_s=1e-4, kv_token_s=1e-7, token_s=1e-4, pair_s=0.0)
PREDICTOR = Predictor(STEP, chunk=2048, active=64)
CRITICAL, ELEVATED, NORMAL = (
    int(level) for level in (PressureLevel.CRITICAL, PressureLevel.ELEVATED, PressureLevel.NORMAL)
)


def fleet(replicas: int = 3, **columns: list[float]) -> FleetView:
    """With fresh reports, and these values in its columns."""
    view = FleetView([f"r{n}" for n in range(replicas)])
    view.seen_s[:] = NOW_S
    view.kv_tokens[:] = 100_000
    for name, values in columns.items():
        getattr(view, name)[:] = values
    return view


def predicted(index: PrefixIndex | None = None, routers: int = 1, seed: int = 0) -> PredictedLatency:
    made = index or PrefixIndex(1000)
    return PredictedLatency(lambda: PREDICTOR, Traffic(), made, 512, random.Random(seed), routers)


def policies() -> list[RoutingPolicy]:
    rng = random.Random(0)
    return [
        predicted(),
        Load(rng),
        RoundRobin(),
        Random(rng),
        PowerOfTwo(rng),
        LlmD(rng),
        RayPrefix(rng, PrefixIndex(100), 512, 10.0),
        Llumnix(Traffic()),
    ]


ONE = RouteRequest(1000, slo=Slo(ttft_ms=500.0, tpot_ms=50.0))


@given(
    st.integers(1, 12).flatmap(
        lambda count: st.tuples(
            *(st.lists(st.integers(0, most), min_size=count, max_size=count) for most in (50, 50, 50, 2, 100_000))
        )
    )
)
def test_everyone_is_ranked_once(columns: tuple[list[int], ...]) -> None:
    """Whatever is known, every policy's order has each replica once, the best first, and a reason for each."""
    names = ("running", "waiting", "in_flight", "level", "kv_used")
    view = fleet(len(columns[0]), **dict(zip(names, columns, strict=True)))  # type: ignore[arg-type]
    for policy in policies():
        ranking = policy.rank(ONE, view, NOW_S)
        assert sorted(ranking.order()) == list(range(len(view)))
        assert ranking.order()[0] == ranking.best
        assert all(ranking.reason(row) for row in range(len(view)))


@pytest.mark.parametrize("policy", policies(), ids=lambda policy: type(policy).__name__)
def test_a_replica_that_failed_is_last(policy: RoutingPolicy) -> None:
    """One that has just failed, or is closed, comes after all others."""
    view = fleet(running=[9, 9, 0])
    view.failed(2, NOW_S)
    view.closed[1] = True
    for _ in range(5):
        assert policy.rank(ONE, view, NOW_S).best == 0


def test_load_counts_reports_and_own_requests() -> None:
    """The larger of what the engine reports, a waiting request for two, and what is in flight from here."""
    policy = Load(random.Random(0))
    assert policy.rank(ONE, fleet(in_flight=[3, 1, 2]), NOW_S).order() == [1, 2, 0]
    assert policy.rank(ONE, fleet(running=[9, 0, 0], in_flight=[0, 2, 3]), NOW_S).order() == [1, 2, 0]
    assert policy.rank(ONE, fleet(waiting=[3, 0, 0], running=[0, 4, 7]), NOW_S).order() == [1, 0, 2]


def test_load_puts_critical_pressure_last_and_elevated_behind_a_few_requests() -> None:
    """CRITICAL is last whatever the load; ELEVATED is worth four requests; where all are CRITICAL load decides."""
    policy = Load(random.Random(0))
    assert policy.rank(ONE, fleet(level=[CRITICAL, ELEVATED, NORMAL], running=[0, 50, 60]), NOW_S).order() == [1, 2, 0]
    assert policy.rank(ONE, fleet(level=[ELEVATED, NORMAL, NORMAL], running=[0, 2, 9]), NOW_S).order() == [1, 0, 2]
    assert policy.rank(ONE, fleet(level=[CRITICAL] * 3, running=[4, 2, 3]), NOW_S).order() == [1, 2, 0]


def test_load_believes_no_old_report() -> None:
    """Of a replica whose report is old only the own count is left."""
    view = fleet(level=[CRITICAL, NORMAL, NORMAL], running=[50, 1, 1])
    view.seen_s[0] = NOW_S - 10
    assert Load(random.Random(0)).rank(ONE, view, NOW_S).best == 0


def test_round_robin_takes_each_in_turn() -> None:
    """As many requests as replicas go to all of them."""
    policy = RoundRobin()
    assert [policy.rank(ONE, fleet(), NOW_S).best for _ in range(6)] == [0, 1, 2, 0, 1, 2]


def test_power_of_two_never_takes_the_busiest_of_three() -> None:
    """Of any two the busier loses, so the busiest gets nothing, and the idlest most."""
    policy = PowerOfTwo(random.Random(1))
    chosen = Counter(policy.rank(ONE, fleet(running=[1, 5, 9]), NOW_S).best for _ in range(300))
    assert set(chosen) == {0, 1} and chosen[0] > chosen[1]


def test_llm_d_takes_the_less_saturated() -> None:
    """A queue of five weighs as much as 80 % of the KV memory; running requests play no part."""
    view = fleet(waiting=[5, 0, 1], kv_used=[0, 70_000, 10_000], running=[0, 0, 99])
    assert LlmD(random.Random(0)).rank(ONE, view, NOW_S).order() == [2, 1, 0]


def test_llumnix_takes_the_freest() -> None:
    """Free memory that queued prompts do not need, by running requests."""
    view = fleet(kv_used=[50_000, 50_000, 10_000], running=[2, 10, 2], waiting=[0, 0, 150])
    assert Llumnix(Traffic(prompt_tokens=1000)).rank(ONE, view, NOW_S).order() == [0, 1, 2]


def test_ray_prefix_follows_the_prefix_until_queues_differ() -> None:
    """The replica with the prefix is taken while queues are even; then two at random decide, and with no match the
    least
    used cache."""
    index = PrefixIndex(100)
    index.insert([1, 2], 1)
    policy = RayPrefix(random.Random(0), index, 512, imbalance=10.0)
    request = RouteRequest(2000, (1, 2, 3))
    assert policy.rank(request, fleet(running=[0, 9, 0]), NOW_S).best == 1
    assert policy.rank(request, fleet(running=[0, 10, 0]), NOW_S).best != 1
    assert policy.rank(RouteRequest(2000, (7,)), fleet(), NOW_S).best != 1


def test_predicted_weighs_prefix_against_load() -> None:
    """A replica that holds the prompt is worth a few requests more, and not any number."""
    index = PrefixIndex(1000)
    policy = predicted(index)
    request = RouteRequest(8192, tuple(range(16)), Slo(ttft_ms=2000.0, tpot_ms=50.0))
    policy.sent(request, 1)
    assert policy.rank(request, fleet(running=[4, 8, 4]), NOW_S).best == 1
    assert policy.rank(request, fleet(running=[4, 64, 4], waiting=[0, 40, 0]), NOW_S).best != 1
    policy.lost(1)
    assert policy.rank(request, fleet(running=[4, 8, 4]), NOW_S).best != 1


@pytest.mark.parametrize("how", ["stale", "critical"])
def test_predicted_takes_what_is_stale_or_critical_for_saturated(how: str) -> None:
    """The busiest healthy replica is preferred to an idle one without a fresh report, or under critical pressure."""
    view = fleet(running=[0, 60, 60], waiting=[0, 50, 60])
    if how == "stale":
        view.seen_s[0] = NOW_S - 10
    else:
        view.level[0] = CRITICAL
    assert predicted().rank(ONE, view, NOW_S).order() == [1, 2, 0]


def test_predicted_avoids_a_replica_without_memory() -> None:
    """One whose KV memory is full makes a request wait for others to end."""
    assert predicted().rank(ONE, fleet(kv_used=[99_900, 10_000, 20_000], running=[5, 5, 5]), NOW_S).order()[-1] == 0


def test_many_routers_do_not_herd() -> None:
    """Fifty routers with the same reports, in which one replica is idle, do not all send to it at once."""
    running = [10.0] * 49 + [0.0]
    together = Counter(
        predicted(routers=50, seed=seed).rank(ONE, fleet(50, running=running), NOW_S).best for seed in range(50)
    )
    assert max(together.values()) <= 8
    assert predicted().rank(ONE, fleet(50, running=running), NOW_S).best == 49  # alone, it takes the best


@given(st.integers(0, 60), st.integers(0, 2000), st.integers(1, 40))
def test_more_requests_never_shorten_a_prediction(requests: int, context: int, more: int) -> None:
    """Predicted times grow with what a replica has."""
    view = fleet(2, running=[requests, requests + more], kv_used=[requests * context, (requests + more) * context])
    seconds = PREDICTOR.predict(view, 1000, np.zeros(2), Traffic())
    assert seconds.ttft_s[1] >= seconds.ttft_s[0] and seconds.tpot_s[1] >= seconds.tpot_s[0]
