"""One simulated ingress: its view of the fleet, its routing policy, and what it has learned."""

import random
from collections.abc import Callable

from cluster.bench.errors import BenchError
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
    Ranking,
    RayPrefix,
    RoundRobin,
    RouteRequest,
    RoutingPolicy,
)

POLICIES = (
    "predicted",
    "load",
    "round-robin",
    "random",
    "power-of-two",
    "llm-d",
    "ray-prefix",
    "ray-prefix-10",
    "llumnix",
)


class SimRouter:
    """Attributes: fleet: what it knows of the replicas; policy: how it chooses."""

    def __init__(
        self,
        policy: str,
        ids: list[str],
        predictor: Callable[[], Predictor],
        prefix_tokens: int,
        kv_tokens: int,
        routers: int,
        rng: random.Random,
    ) -> None:
        self.fleet = FleetView(ids)
        self.traffic = Traffic()
        self.policy = self._made(policy, predictor, prefix_tokens, kv_tokens, routers, rng)

    def _made(
        self,
        name: str,
        predictor: Callable[[], Predictor],
        prefix_tokens: int,
        kv_tokens: int,
        routers: int,
        rng: random.Random,
    ) -> RoutingPolicy:
        index = PrefixIndex(max(1, kv_tokens // prefix_tokens))
        makers: dict[str, Callable[[], RoutingPolicy]] = {
            "predicted": lambda: PredictedLatency(predictor, self.traffic, index, prefix_tokens, rng, routers),
            "load": lambda: Load(rng, routers),
            "round-robin": RoundRobin,
            "random": lambda: Random(rng),
            "power-of-two": lambda: PowerOfTwo(rng),
            "llm-d": lambda: LlmD(rng),
            "ray-prefix": lambda: RayPrefix(rng, index, prefix_tokens, float("inf")),
            "ray-prefix-10": lambda: RayPrefix(rng, index, prefix_tokens, 10.0),
            "llumnix": lambda: Llumnix(self.traffic),
        }
        if name not in makers:
            raise BenchError(f"--policy {name!r} does not exist: give one of {', '.join(makers)}")
        return makers[name]()

    def rank(self, request: RouteRequest, now_s: float) -> Ranking:
        return self.policy.rank(request, self.fleet, now_s)

    def send(self, request: RouteRequest, ranking: Ranking, row: int, now_s: float) -> int:
        """The request goes to that replica; its prompt's tokens that are taken to be computed there."""
        hits = 0 if ranking.hit_tokens is None else int(ranking.hit_tokens[row])
        tokens = max(1, request.prompt_tokens - hits)
        self.traffic.sent(tokens, len(self.fleet), now_s)
        self.policy.sent(request, row)
        self.fleet.sent(row, tokens)
        return tokens
