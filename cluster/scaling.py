"""How many replicas a model needs. Pure: what was seen, and ``now``, in; a number with its reason out.

    busy share  = (prompt tokens/s * seconds of one + output tokens/s * seconds of one) / what a replica has to give
    what it has = 1 - step_s / TPOT target: steps as long as the target allows, their constant part taken off
    wanted      = busy share / goal, or KV tokens in use / what a replica holds, whichever is more

Reactive plus a short forecast: the busy share that counts is the larger of the present one and the one that the trend
of the last minute leads to when a replica that is started now is ready. Up at once; down only after ``calm_s`` below,
by at most a quarter at a time, and those that go are drained. Of engines whose step time is not known the requests
count instead of the tokens, against those that a replica runs at once.
"""

import math
from dataclasses import dataclass, replace

from replicas.step_time import StepTime

_FORECAST_MOST = 2.0
"""A forecast is believed up to so many times the present."""
_DOWN_SHARE = 0.25


@dataclass(frozen=True)
class Demand:
    """What a model is asked for.

    Attributes:
        prompt_rate, output_rate: tokens a second of all replicas; prompts without what prefix caches hold.
        context_tokens: before an output token, on average.
        kv_tokens: in use, and asked for by what waits.
        waiting_s: of computing, that stands in queues.
    """

    prompt_rate: float
    output_rate: float
    context_tokens: float
    kv_tokens: float
    waiting_s: float = 0.0

    def busy(self, step_time: StepTime) -> float:
        """Replicas' worth of computing."""
        a_prompt_token_s = step_time.token_s + step_time.pair_s * self.context_tokens / 2
        an_output_token_s = step_time.row_s + step_time.kv_token_s * self.context_tokens
        return self.prompt_rate * a_prompt_token_s + self.output_rate * an_output_token_s


@dataclass(frozen=True)
class ScalingSettings:
    """Attributes:
    goal: part of what a replica has to give that should be in use.
    tpot_target_s: of the class that most requests are in.
    start_s: until a replica that is started is ready; clear_s: in which a queue should be gone.
    """

    least: int
    most: int
    tpot_target_s: float
    kv_tokens: int
    start_s: float = 60.0
    goal: float = 0.7
    calm_s: float = 120.0
    clear_s: float = 30.0


@dataclass(frozen=True)
class ScalingState:
    """What is remembered between decisions: (seconds, busy share) of the last minute, and since when fewer would do."""

    seen: tuple[tuple[float, float], ...] = ()
    below_since_s: float = math.inf


@dataclass(frozen=True)
class ScalingDecision:
    """How many replicas there should be, starting ones included."""

    replicas: int
    reason: str


def decide_scale(
    state: ScalingState,
    demand: Demand,
    replicas: int,
    step_time: StepTime,
    settings: ScalingSettings,
    now_s: float,
) -> tuple[ScalingState, ScalingDecision]:
    """The next state, and what is wanted instead of ``replicas``, those that start included."""
    busy = demand.busy(step_time) + demand.waiting_s / settings.clear_s
    usable = max(0.1, 1 - step_time.step_s / settings.tpot_target_s)
    by_memory = demand.kv_tokens / (settings.kv_tokens * settings.goal) if settings.kv_tokens else 0.0
    return _decide(state, busy, usable, by_memory, replicas, settings, now_s)


def decide_by_requests(
    state: ScalingState, requests: float, of_one: int, replicas: int, settings: ScalingSettings, now_s: float
) -> tuple[ScalingState, ScalingDecision]:
    """Likewise, of ``requests``, running and waiting ones, of which a replica runs ``of_one`` at once."""
    return _decide(state, requests / of_one, 1.0, 0.0, replicas, settings, now_s)


def _decide(
    state: ScalingState,
    busy: float,
    usable: float,
    by_memory: float,
    replicas: int,
    settings: ScalingSettings,
    now_s: float,
) -> tuple[ScalingState, ScalingDecision]:
    """usable: of a replica, what can be busy; by_memory: replicas whose memory is needed."""
    seen = (*((at_s, value) for at_s, value in state.seen if now_s - at_s <= 60.0), (now_s, busy))
    ahead = _forecast(seen, settings.start_s)
    by_work = max(busy, ahead) / (usable * settings.goal)
    wanted = min(max(math.ceil(max(by_work, by_memory)), settings.least), settings.most)
    why = (
        f"{busy:.1f} replicas' worth of work, {ahead:.1f} in {settings.start_s:.0f} s, memory for {by_memory:.1f}: "
        f"{wanted} at {settings.goal:.0%}"
    )
    state = replace(state, seen=seen)
    if wanted >= replicas:
        return replace(state, below_since_s=math.inf), ScalingDecision(wanted, why)
    below_since_s = min(state.below_since_s, now_s)
    if now_s - below_since_s < settings.calm_s:
        waits = f"{why}; fewer since {now_s - below_since_s:.0f} s, down after {settings.calm_s:.0f}"
        return replace(state, below_since_s=below_since_s), ScalingDecision(min(replicas, settings.most), waits)
    least = replicas - max(1, int(replicas * _DOWN_SHARE))
    return replace(state, below_since_s=now_s), ScalingDecision(max(wanted, least), why)


def _forecast(seen: tuple[tuple[float, float], ...], ahead_s: float) -> float:
    """Where the line through what was seen leads, from the present value on; never below it."""
    at_s, now = seen[-1]
    if len(seen) < 3:
        return now
    mean_s = sum(one for one, _ in seen) / len(seen)
    mean = sum(value for _, value in seen) / len(seen)
    spread = sum((one - mean_s) ** 2 for one, _ in seen)
    slope = sum((one - mean_s) * (value - mean) for one, value in seen) / spread if spread else 0.0
    # A line through a few seconds says nothing about a minute: it counts by the part of that time that it was seen.
    known = min(1.0, (at_s - seen[0][0]) / ahead_s) if ahead_s > 0 else 1.0
    return min(now + max(0.0, slope) * ahead_s * known, _FORECAST_MOST * max(now, 1e-9))
