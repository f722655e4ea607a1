"""How routers choose: policies that rank the replicas of a model. Pure: what is known, and ``now``, in; an order with
its reason out. The live router and the simulator use the same ones.

    name            by
    predicted       predicted TTFT and TPOT against the request's targets, and what it costs those who are there; ours
    load            pressure, then running and waiting requests; ours, needs nothing but reports
    round-robin, random
    power-of-two    the less loaded of two at random (Mitzenmacher, 2001); Ray Serve's own
    llm-d           max(queue / 5, KV usage / 0.8), the saturation of the Gateway API inference extension
    ray-prefix      Ray Serve LLM's PrefixCacheAffinityRouter; ``ray-prefix-10`` falls back to power-of-two where queues
                    differ by 10
    llumnix         most freeness: KV memory that neither running nor queued requests need, by running requests (Sun et
                    al., OSDI 2024)
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from cluster.bench.report import Slo
from cluster.fleet_view import Bools, FleetView, Floats
from cluster.prediction import Predicted, Predictor, Traffic
from cluster.prefix_index import PrefixIndex
from cluster.sessions import Session
from memory_agent.reports import PressureLevel

PRESSURE_PENALTY = np.array([0.0, 4.0, 0.0])
"""Requests in flight that a pressure level weighs as much as. CRITICAL is a rank of its own, below all others."""
WAITING_WEIGHT = 2.0
"""A waiting request delays a new one more than a running one does: it is served before it."""
SATURATED = 1e6
"""Added to the score of a replica that should get nothing while any other one can."""
LEFT_OUT = 1e9
HOME_REQUESTS = 8.0
"""A session stays where it is until so many more requests are there than elsewhere, where latency is not predicted."""
HOME = 1e3
"""Taken off the score of a session's replica that is predicted to keep the request's targets: more than any cost to
others, and less than what keeps requests from a replica that is not well."""


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What a router knows of a request.

    Attributes:
        prefix: ids of its prompt's prefix blocks; see ``cluster.prefix_index``.
        session: that it belongs to.
        home: row of the replica that had its session last.
    """

    prompt_tokens: int
    prefix: tuple[int, ...] = ()
    slo: Slo = field(default_factory=Slo)
    session: Session | None = None
    home: int | None = None


@dataclass(frozen=True, slots=True)
class Ranking:
    """Replicas by row of the fleet.

    Attributes:
        scores: lower is better, of shape (replicas,).
        reason: why one of its rows has its score, in words.
        hit_tokens: of the prompt, taken to be in each replica's prefix cache; None where the policy does not care.
        predicted: TTFT and TPOT, where the policy predicts.
    """

    scores: Floats
    reason: Callable[[int], str]
    hit_tokens: Floats | None = None
    predicted: Predicted | None = None

    @property
    def best(self) -> int:
        return int(self.scores.argmin())

    def order(self) -> list[int]:
        """All rows, best first."""
        return [int(row) for row in np.argsort(self.scores, kind="stable")]


class RoutingPolicy(Protocol):
    """Chooses for one router. Used by one thread."""

    def rank(self, request: RouteRequest, fleet: FleetView, now_s: float) -> Ranking:
        """Rank every replica of the fleet, which has at least one."""
        ...

    def sent(self, request: RouteRequest, row: int) -> None:
        """The request goes to that replica."""
        ...

    def lost(self, row: int) -> None:
        """The replica has started anew, its caches cold."""
        ...


class _Blind:
    """Learns nothing from what is sent."""

    def sent(self, request: RouteRequest, row: int) -> None:
        return

    def lost(self, row: int) -> None:
        return


class RoundRobin(_Blind):
    """Each in turn."""

    def __init__(self) -> None:
        self._next = 0

    def rank(self, request: RouteRequest, fleet: FleetView, now_s: float) -> Ranking:
        turn = self._next % len(fleet)
        self._next += 1
        scores = (np.arange(len(fleet)) - turn) % len(fleet) + LEFT_OUT * fleet.left_out(now_s)
        return Ranking(scores, lambda row: "its turn")


class Random(_Blind):
    """Anyone."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = np.random.default_rng(rng.getrandbits(64))

    def rank(self, request: RouteRequest, fleet: FleetView, now_s: float) -> Ranking:
        return Ranking(self._rng.random(len(fleet)) + LEFT_OUT * fleet.left_out(now_s), lambda row: "drawn")


class PowerOfTwo(_Blind):
    """The less loaded of two; the others follow by chance."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._noise = np.random.default_rng(rng.getrandbits(64))

    def rank(self, request: RouteRequest, fleet: FleetView, now_s: float) -> Ranking:
        requests = fleet.requests
        noise = self._noise.random(len(fleet))
        scores = SATURATED * (1 + noise)
        two = self._rng.sample(range(len(fleet)), min(2, len(fleet)))
        scores[two] = requests[two] + noise[two] / 2  # equals by chance
        return Ranking(
            scores + LEFT_OUT * fleet.left_out(now_s), lambda row: f"{requests[row]:.0f} requests, the fewer of two"
        )


class LlmD(_Blind):
    """llm-d's saturation."""

    QUEUE, KV = 5.0, 0.8

    def __init__(self, rng: random.Random) -> None:
        self._noise = np.random.default_rng(rng.getrandbits(64))

    def rank(self, request: RouteRequest, fleet: FleetView, now_s: float) -> Ranking:
        usage = fleet.kv_used / np.maximum(fleet.kv_tokens, 1.0)
        scores = np.maximum(fleet.waiting / self.QUEUE, usage / self.KV)
        broken = scores + 1e-6 * self._noise.random(len(fleet)) + LEFT_OUT * fleet.left_out(now_s)
        return Ranking(broken, lambda row: f"saturation {scores[row]:.2f}")


class RayPrefix:
    """Longest matched prefix while queues are even, the least used cache where nothing matches, else power of two."""

    MATCH_SHARE = 0.1

    def __init__(self, rng: random.Random, index: PrefixIndex, block_tokens: int, imbalance: float) -> None:
        self._two = PowerOfTwo(rng)
        self._index, self._block_tokens, self._imbalance = index, block_tokens, imbalance

    def rank(self, request: RouteRequest, fleet: FleetView, now_s: float) -> Ranking:
        requests = fleet.requests
        two = self._two.rank(request, fleet, now_s)
        if requests.max() - requests.min() >= self._imbalance:
            return two
        hits = self._index.matches(request.prefix, len(fleet)) * self._block_tokens
        if hits.max() >= self.MATCH_SHARE * request.prompt_tokens:
            return Ranking(
                two.scores - 10 * SATURATED * (hits == hits.max()), lambda row: f"{hits[row]:.0f} tokens match"
            )
        sizes = np.array([self._index.size(row) for row in range(len(fleet))])
        return Ranking(two.scores - 10 * SATURATED * (sizes == sizes.min()), lambda row: "least used prefix cache")

    def sent(self, request: RouteRequest, row: int) -> None:
        self._index.insert(request.prefix, row)

    def lost(self, row: int) -> None:
        self._index.forget(row)


class Llumnix(_Blind):
    """Freeness, as Llumnix dispatches."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic

    def rank(self, request: RouteRequest, fleet: FleetView, now_s: float) -> Ranking:
        queued = np.maximum(fleet.waiting + np.maximum(fleet.changed, 0.0), 0.0) * self._traffic.prompt_tokens
        free = (fleet.kv_tokens - fleet.kv_used - queued) / np.maximum(fleet.running, 1.0)
        return Ranking(-free + LEFT_OUT * fleet.left_out(now_s), lambda row: f"freeness {free[row]:.0f} tokens")


class Load(_Blind):
    """Requests ahead of a new one, in units of running requests; CRITICAL pressure last.

    The engines' counts lag by up to a report's age but include what other routers have sent; the local count knows what
    was sent a moment ago. The larger of both misses least. What is not fresh is not believed: the local count is left.
    Of ``routers`` that see the same reports each looks at a part of the replicas, as in ``PredictedLatency``.
    """

    def __init__(self, rng: random.Random, routers: int = 1) -> None:
        self._noise = np.random.default_rng(rng.getrandbits(64))
        self._routers = routers

    def rank(self, request: RouteRequest, fleet: FleetView, now_s: float) -> Ranking:
        fresh = fleet.fresh(now_s)
        level = np.where(fresh, fleet.level, PressureLevel.NORMAL)
        reported = np.where(fresh, fleet.running + WAITING_WEIGHT * fleet.waiting, 0.0)
        load = np.maximum(fleet.in_flight, reported) + PRESSURE_PENALTY[level]
        ties = 1e-3 * np.minimum(fleet.in_flight, 500.0) + 1e-4 * self._noise.random(len(fleet))
        last = SATURATED * (level == PressureLevel.CRITICAL) + LEFT_OUT * fleet.left_out(now_s)
        last += SATURATED / 2 * _overlooked(self._noise, len(fleet), self._routers, request.home)
        last -= HOME_REQUESTS * _at_home(request, len(fleet))
        return Ranking(
            load + ties + last, lambda row: f"load {load[row]:.0f}, pressure {PressureLevel(level[row]).name}"
        )


class PredictedLatency:
    """The least predicted share of the request's targets, and cost to those who are there.

    A target that is missed counts ``_MISS`` times what is beyond it. A replica without a fresh report counts as
    saturated, as does one under CRITICAL pressure. Of ``routers`` that see the same reports, each looks at that part of
    the replicas, drawn anew for each request, so that the best one is found by one of them on average and not by all at
    once; replicas that hold the request's prefix are always looked at. ``default``: targets of requests without.
    """

    _MISS = 4.0

    def __init__(
        self,
        predictor: Callable[[], Predictor],
        traffic: Traffic,
        index: PrefixIndex,
        block_tokens: int,
        rng: random.Random,
        routers: int = 1,
        default: Slo | None = None,
    ) -> None:
        self._predictor, self._traffic, self._index = predictor, traffic, index
        self._block_tokens, self._routers = block_tokens, routers
        self._default = default or Slo(ttft_ms=2000.0, tpot_ms=100.0)
        self._noise = np.random.default_rng(rng.getrandbits(64))

    def rank(self, request: RouteRequest, fleet: FleetView, now_s: float) -> Ranking:
        hits = self._hits(request, len(fleet))
        predictor = self._predictor()
        seconds = predictor.predict(fleet, request.prompt_tokens, hits, self._traffic)
        slo = request.slo
        ttft_target_s = (slo.ttft_ms or self._default.ttft_ms or 1.0) / 1000
        tpot_target_s = (slo.tpot_ms or self._default.tpot_ms or 1.0) / 1000
        ttft, tpot = seconds.ttft_s / ttft_target_s, seconds.tpot_s / tpot_target_s
        own = _cost(ttft, self._MISS) + _cost(tpot, self._MISS)
        # Those who run lose the time of this prompt once, and that of one more row with every token.
        step, rows = predictor.step_time, np.minimum(fleet.requests, predictor.active)
        longer_s = step.row_s + request.prompt_tokens * step.kv_token_s
        others = 2 * tpot * rows * (seconds.own_s / max(self._traffic.output_tokens, 1.0) + longer_s) / tpot_target_s
        queue = fleet.pending_tokens / max(self._traffic.prompt_tokens, 1.0)
        others += 2 * ttft * queue * seconds.own_s / ttft_target_s
        unfit = ~fleet.fresh(now_s) | (fleet.level == PressureLevel.CRITICAL)
        scores = own + others + SATURATED * unfit + LEFT_OUT * fleet.left_out(now_s)
        scores += 1e-9 * self._noise.random(len(fleet))
        scores += SATURATED / 2 * _overlooked(self._noise, len(fleet), self._routers, request.home) * (hits <= 0)
        scores -= HOME * (_at_home(request, len(fleet)) & (ttft <= 1) & (tpot <= 1))

        def reason(row: int) -> str:
            return (
                f"TTFT {1000 * seconds.ttft_s[row]:.0f} ms, TPOT {1000 * seconds.tpot_s[row]:.1f} ms, "
                f"{hits[row]:.0f} tokens cached, {others[row]:.2f} to others"
            )

        return Ranking(scores, reason, hits, seconds)

    def sent(self, request: RouteRequest, row: int) -> None:
        self._index.insert(request.prefix, row)

    def lost(self, row: int) -> None:
        self._index.forget(row)

    def _hits(self, request: RouteRequest, rows: int) -> Floats:
        hits = self._index.matches(request.prefix, rows) * self._block_tokens
        return np.minimum(hits, request.prompt_tokens - 1.0)


def _at_home(request: RouteRequest, replicas: int) -> Bools:
    """Which of the replicas had the request's session."""
    at_home = np.zeros(replicas, dtype=bool)
    if request.home is not None:
        at_home[request.home] = True
    return at_home


def _overlooked(noise: np.random.Generator, replicas: int, routers: int, home: int | None) -> Bools:
    """Replicas that one of ``routers`` does not look at this time: each looks at its part, two at least, so that the
    best one is found by one of them on average and not by all at once; and at the request's ``home``."""
    overlooked = np.zeros(replicas, dtype=bool)
    if routers > 1:
        overlooked[noise.permutation(replicas)[max(2, -(-replicas // routers)) :]] = True
        if home is not None:
            overlooked[home] = False
    return overlooked


def _cost(share: Floats, weight: float) -> Floats:
    """Of a share of a target: its square, so that what is near its target weighs more than what is far; what is beyond
    the whole counts ``weight`` times."""
    return np.where(share <= 1, share * share, 1 + weight * (share - 1))
