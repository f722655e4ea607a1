"""What requests are predicted to take, and how the error is measured."""

import math

import numpy as np
import pytest

from cluster.cluster_view import EnginePressure
from cluster.fleet_view import STALE_AFTER_S, FleetView
from cluster.prediction import PredictionError, Predictor, Traffic, common_predictor
from memory_agent.reports import PressureLevel
from replicas.step_time import StepTime, StepWork, prompt_pairs

STEP = StepTime(step_s=0.01, row_s=1e-4, kv_token_s=1e-7, token_s=1e-4, pair_s=1e-9)
PREDICTOR = Predictor(STEP, chunk=512, active=4, overhead_s=0.003)


def test_an_idle_replica_takes_the_prompts_own_steps() -> None:
    """Nobody is there: the prompt in chunks, and what is outside of steps; a hit leaves only the rest to compute."""
    fleet = FleetView(["cold", "warm"])
    seconds = PREDICTOR.predict(fleet, 1000, np.array([0.0, 500.0]), Traffic())
    whole_s = STEP.seconds(StepWork(tokens=1000, pairs=prompt_pairs(0, 1000))) + STEP.step_s  # two chunks
    rest_s = STEP.seconds(StepWork(tokens=500, pairs=prompt_pairs(500, 500)))
    assert seconds.ttft_s == pytest.approx([0.003 + whole_s, 0.003 + rest_s])
    assert seconds.tpot_s[0] == pytest.approx(STEP.seconds(StepWork(rows=1, kv_tokens=1000)))


def test_a_request_without_a_place_waits_for_one() -> None:
    """Where as many run as can, the next one waits about as long as an answer takes until one of them ends."""
    fleet = FleetView(["full", "free"])
    fleet.running[:] = [4, 3]
    seconds = PREDICTOR.predict(fleet, 100, np.zeros(2), Traffic(output_tokens=100))
    assert seconds.ttft_s[0] - seconds.ttft_s[1] > 100 * STEP.step_s / 4


def words(step_time: StepTime | None, age_s: float = 0.0, **settings: int) -> EnginePressure:
    return EnginePressure(PressureLevel.NORMAL, 0.0, 0.0, 0, 0, age_s, step_time=step_time, **settings)


def test_what_is_common_is_the_mean_of_those_who_know() -> None:
    """Engines that have learned nothing yet, or have not reported lately, say nothing; where all are such, nobody
    does."""
    slow = StepTime(0.03, 3e-4, 3e-7, 3e-4, 3e-9)
    known = [words(STEP, max_num_seqs=64, max_num_batched_tokens=512), words(slow, max_num_batched_tokens=2048)]
    silent = [words(None, max_num_seqs=999), words(StepTime(9.0), age_s=STALE_AFTER_S + 1)]
    common = common_predictor([*known, *silent])
    assert common is not None
    assert common.step_time.parts == pytest.approx(StepTime(0.02, 2e-4, 2e-7, 2e-4, 2e-9).parts)
    assert (common.chunk, common.active) == (2048, 64)
    assert common_predictor(silent) is None


def test_several_routers_count_for_the_rate_of_a_replica() -> None:
    """What one of them sees is a part of what a replica gets."""
    alone, one_of_three = Traffic(), Traffic(routers=3)
    for traffic in (alone, one_of_three):
        traffic.sent(600, replicas=2, now_s=10.0)
    assert one_of_three.prompt_rate == pytest.approx(3 * alone.prompt_rate)
    assert one_of_three.prompt_tokens == alone.prompt_tokens


def test_a_replica_that_may_run_fewer_makes_wait_sooner() -> None:
    """The controller has bounded one of two: with as many requests the next one waits there."""
    fleet = FleetView(["bounded", "free"])
    fleet.running[:] = [2, 2]
    fleet.active[:] = [2, 0]
    seconds = PREDICTOR.predict(fleet, 100, np.zeros(2), Traffic(output_tokens=100))
    assert seconds.ttft_s[0] - seconds.ttft_s[1] > 100 * STEP.step_s / 4


def test_traffic_follows_what_comes() -> None:
    """Averages move to what recent requests are like, and the rate to what a replica gets."""
    traffic = Traffic()
    for at in range(2000):
        traffic.sent(2000, replicas=4, now_s=at / 10)
        traffic.answered(50)
    assert traffic.prompt_tokens == pytest.approx(2000, rel=0.01)
    assert traffic.output_tokens == pytest.approx(50, rel=0.01)
    assert traffic.prompt_rate == pytest.approx(2000 * 10 / 4, rel=0.05)


def test_errors_twice_and_half_weigh_alike() -> None:
    """Predictions that are twice or half of what came are off by 100 %, and without bias together."""
    error = PredictionError()
    for _ in range(10):
        error.observe(2.0, 1.0)
        error.observe(0.5, 1.0)
    assert error.median == pytest.approx(1.0)
    assert error.bias == pytest.approx(0.0)
    assert error.to_json() == {"count": 20, "median_error": 1.0, "bias": 0.0}
    assert PredictionError().to_json() == {"count": 0, "median_error": None, "bias": None}


@pytest.mark.parametrize(("predicted", "actual"), [(math.nan, 1.0), (1.0, math.nan), (0.0, 1.0), (1.0, -1.0)])
def test_times_that_are_none_are_no_errors(predicted: float, actual: float) -> None:
    """A request without a second token, or a clock that is wrong, is not measured."""
    error = PredictionError()
    error.observe(predicted, actual)
    assert error.count == 0 and math.isnan(error.median)
