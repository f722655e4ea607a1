"""The policy that Ray Serve's controller calls, on contexts as it makes them."""

import time
from typing import Any

import pytest
from ray.serve.config import AutoscalingContext

import cluster.autoscaling
from cluster.app import _scaling
from cluster.autoscaling import DemandPolicy, replica_demands, total_demand
from cluster.config import ModelConfig
from cluster.decision import Decision
from cluster.dispatcher import RoutingSettings
from replicas.replica_demand import ReplicaDemand
from replicas.spec import EngineSpec
from replicas.step_time import StepTime

STEP = StepTime(step_s=0.01, row_s=1e-3, kv_token_s=0.0, token_s=1e-4)
KNOWN = {"step_s": STEP.step_s, "row_s": STEP.row_s, "token_s": STEP.token_s}


def context(
    *replicas: ReplicaDemand, target: int, queued: float = 0.0, running: int | None = None, least: int = 1
) -> AutoscalingContext:
    """What Ray Serve hands over for replicas that ask for this, of ``target`` that are wanted."""
    stats: dict[str, dict[Any, float]] = {}
    for number, replica in enumerate(replicas):
        for name, value in replica.to_stats().items():
            stats.setdefault(name, {})[f"r{number}"] = value
    missing: Any = None
    return AutoscalingContext(
        deployment_id=missing,
        deployment_name="engine",
        app_name="m",
        current_num_replicas=len(replicas) if running is None else running,
        target_num_replicas=target,
        running_replicas=[],
        total_num_requests=0.0,
        total_queued_requests=queued,
        aggregated_metrics=stats,
        raw_metrics={},
        capacity_adjusted_min_replicas=least,
        capacity_adjusted_max_replicas=8,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=time.time(),
        config=None,
    )


def policy(calm_s: float = 10.0) -> DemandPolicy:
    return DemandPolicy("m", tpot_target_s=0.05, calm_s=calm_s, requests=64)


def busy(share: float) -> ReplicaDemand:
    """A replica that computes prompts so much of its time."""
    return ReplicaDemand(prompt_rate=share / STEP.token_s, request_rate=1.0, running=1.0, **KNOWN)


@pytest.fixture(autouse=True)
def decisions(monkeypatch: pytest.MonkeyPatch) -> list[Decision]:
    """What the controller is told."""
    told: list[Decision] = []
    monkeypatch.setattr(cluster.autoscaling, "record", told.append)
    return told


def test_every_change_is_recorded_with_its_reason(decisions: list[Decision]) -> None:
    """A look that changes nothing is no decision."""
    one = policy()
    one.decide(context(busy(0.5), target=1), 100.0)
    one.decide(context(busy(1.0), target=1, queued=3.0), 102.0)
    (told,) = decisions
    assert (told.kind, told.subject, told.action) == ("scale", "m", "2 replicas")
    assert "replicas' worth of work" in told.reason
    assert told.inputs == {"replicas": 1, "running": 1, "queued": 3.0}


def test_more_replicas_where_those_there_are_busy() -> None:
    """Two replicas that compute all the time are work for two; at 70 % of the 80 % that the TPOT target leaves that
    needs four."""
    assert policy().decide(context(busy(1.0), busy(1.0), target=2), 100.0) == 4


def test_without_step_times_requests_count() -> None:
    """Engines that nobody measures are full at as many requests as they run at once; what waits for a replica counts
    too."""
    asked = ReplicaDemand(running=60.0, waiting=20.0)
    assert policy().decide(context(asked, target=1), 100.0) == 2
    assert policy().decide(context(asked, target=1, queued=64.0), 100.0) == 4


def test_what_waits_in_front_of_all_counts_once() -> None:
    """Every replica has been told of the same queue."""
    two = [ReplicaDemand(running=16.0, queued=100.0)] * 2
    assert policy().decide(context(*two, target=2), 100.0) == 3


def test_it_looks_once_a_second() -> None:
    """Between two looks what was decided stays."""
    one = policy()
    assert one.decide(context(busy(1.0), target=1), 100.0) == 2
    assert one.decide(context(busy(9.0), target=2), 100.5) == 2
    assert one.decide(context(busy(9.0), target=2), 101.1) == 8


def test_down_after_calm_and_to_zero_only_without_requests() -> None:
    """An idle model ends its replicas one after the other, the last one only where that is allowed; a single request
    keeps one."""
    one, target = policy(), 2
    seen = []
    for at in range(40):
        target = one.decide(context(*[ReplicaDemand(**KNOWN)] * target, target=target, least=0), 100.0 + at)
        seen.append(target)
    assert seen[:10] == [2] * 10 and seen[-1] == 0 and 1 in seen
    kept = policy(calm_s=0.0)
    idle_engine = ReplicaDemand(running=1.0, **KNOWN)
    assert kept.decide(context(idle_engine, target=1, least=0), 100.0) == 1
    assert kept.decide(context(ReplicaDemand(**KNOWN), target=1, least=1), 102.0) == 1
    assert kept.decide(context(ReplicaDemand(**KNOWN), target=1, least=0), 104.0) == 0


def test_replicas_that_start_are_waited_for() -> None:
    """While some of them start nobody knows whether fewer would do, however calm it is."""
    one = policy(calm_s=0.0)
    assert one.decide(context(ReplicaDemand(**KNOWN), target=3, running=1), 100.0) == 3
    assert one.decide(context(*[ReplicaDemand(**KNOWN)] * 3, target=3), 102.0) == 2


def test_numbers_of_replicas_become_one_demand() -> None:
    """Rates add up; what a prompt is like follows from them; queued requests are taken to be like the others."""
    two = [
        ReplicaDemand(prompt_rate=1000.0, output_rate=50.0, request_rate=2.0, running=3.0, kv_tokens=900.0, **KNOWN),
        ReplicaDemand(prompt_rate=500.0, output_rate=10.0, request_rate=1.0, running=1.0, waiting=4.0, **KNOWN),
    ]
    stats = {name: {n: one.to_stats()[name] for n, one in enumerate(two)} for name in two[0].to_stats()}
    found = replica_demands(stats)
    assert sorted(found, key=lambda one: one.running) == two[::-1]
    demand = total_demand(found, queued=2.0, step_time=STEP)
    assert (demand.prompt_rate, demand.output_rate, demand.context_tokens) == (1500.0, 60.0, 225.0)
    assert demand.waiting_s == pytest.approx(6 * 500 * STEP.token_s)


def test_ray_serve_makes_the_policy() -> None:
    """The deployment's configuration names the policy by its path, with what it needs; Serve's own delays are off."""
    spec = EngineSpec("m", "/m", 100, 1, 1, 1, 1, max_num_seqs=32)
    bounds = ModelConfig.model_validate({"autoscaling_config": {"min_replicas": 0, "max_replicas": 3}})
    settings = _scaling(spec, bounds, RoutingSettings(tpot_ms=40.0))
    assert (settings.min_replicas, settings.initial_replicas, settings.max_replicas) == (0, 2, 3)
    assert (settings.upscale_delay_s, settings.downscale_delay_s) == (0.0, 0.0)
    made = settings.policy.get_policy()(**settings.policy.policy_kwargs)
    assert (made._requests, made._calm_s, made._tpot_target_s) == (32, 120.0, 0.04)
    assert made(context(busy(1.0), target=1)) == (2, {})
