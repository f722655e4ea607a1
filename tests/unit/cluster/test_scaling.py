"""How many replicas there should be."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.scaling import Demand, ScalingSettings, ScalingState, decide_by_requests, decide_scale
from replicas.step_time import StepTime

STEP = StepTime(step_s=0.01, row_s=1e-4, kv_token_s=0.0, token_s=1e-4)
SETTINGS = ScalingSettings(least=1, most=20, tpot_target_s=0.05, kv_tokens=100_000)


def demand(busy: float, kv_tokens: float = 0.0, waiting_s: float = 0.0) -> Demand:
    """Prompts that keep so many replicas computing all the time."""
    return Demand(busy / STEP.token_s, 0.0, 0.0, kv_tokens, waiting_s)


def settle(
    busy: list[float], replicas: int, every_s: float = 5.0, state: ScalingState | None = None, start_s: float = 0.0
) -> tuple[ScalingState, list[int]]:
    state, wanted = state or ScalingState(), []
    for at, one in enumerate(busy):
        state, decision = decide_scale(state, demand(one), replicas, STEP, SETTINGS, start_s + at * every_s)
        replicas = decision.replicas
        wanted.append(replicas)
    return state, wanted


def test_up_at_once_to_what_is_needed() -> None:
    """Work for 2.8 replicas, at 70 % of the 80 % that steps of the target's length leave, needs five."""
    assert settle([2.8], replicas=2)[1] == [5]


def test_memory_alone_can_ask_for_more() -> None:
    """KV tokens in use beyond what the replicas hold at the goal are a reason by themselves."""
    _, decision = decide_scale(ScalingState(), demand(0.1, kv_tokens=300_000), 2, STEP, SETTINGS, 0.0)
    assert decision.replicas == 5 and "memory for 4.3" in decision.reason


def test_what_waits_is_work_too() -> None:
    """A queue of a minute's computing should be gone in half a minute: two replicas more than the load needs."""
    _, decision = decide_scale(ScalingState(), demand(0.5, waiting_s=60.0), 1, STEP, SETTINGS, 0.0)
    assert decision.replicas == 5


def test_requests_count_where_steps_are_unknown() -> None:
    """Replicas of ten requests at 70 %: 30 requests need five, and fewer only after calm."""
    state, decision = decide_by_requests(ScalingState(), 30.0, 10, 1, SETTINGS, 0.0)
    assert decision.replicas == 5
    _, decision = decide_by_requests(state, 1.0, 10, 5, SETTINGS, 10.0)
    assert decision.replicas == 5 and "down after 120" in decision.reason


def test_a_rising_load_is_met_ahead() -> None:
    """On a steady slope more is asked for than the present load needs, and on a steady load not."""
    slope = settle([0.5 + 0.1 * at for at in range(13)], replicas=1)[1][-1]
    steady = settle([1.7] * 13, replicas=1)[1][-1]
    assert slope > steady == 4


def test_down_only_after_calm_and_in_parts() -> None:
    """A drop of the load changes nothing for two minutes, then a quarter goes at a time."""
    state, _ = settle([5.0], replicas=9)
    _, wanted = settle([0.5] * 80, replicas=9, state=state, start_s=60.0)
    assert wanted[:24] == [9] * 24
    assert wanted[24] == 7 and wanted[-1] < 6


def test_a_load_that_swings_does_not_make_replicas_come_and_go() -> None:
    """Swings shorter than the calm time leave the number where the peaks want it."""
    _, wanted = settle([2.0, 0.5] * 60, replicas=4)
    assert set(wanted[20:]) == {wanted[20]}


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=60), st.integers(0, 30))
def test_the_bounds_are_kept(busy: list[float], replicas: int) -> None:
    """Never fewer than the least nor more than the most, whatever comes."""
    assert all(SETTINGS.least <= one <= SETTINGS.most for one in settle(busy, max(1, replicas))[1])
