"""How the router of one process chooses: a policy over what it knows, and what becomes of its choices.

    choose() -------------> sent() ------> accepted()        by the router, on its thread
      counted at once         put right where another replica took it
    route.first_token(), failed(), ended() --> news          by the core, read with the next choice

A request counts on its replica from the choice to its end, so that requests which choose at the same moment do not all
see the same idle replica. Where latency cannot be predicted, because no engine has reported lately what its steps take,
the load decides.
"""

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from cluster.bench.report import Slo
from cluster.fleet_view import FleetView, ReplicaReport
from cluster.prediction import EngineWords, Predictor, Traffic, common_predictor
from cluster.prefix_index import PrefixIndex
from cluster.prompt_prefix import PREFIX_TOKENS
from cluster.route import News, Route, RouteEvent, Standing
from cluster.routing_policy import Load, PredictedLatency, Ranking, RouteRequest, RoutingPolicy
from cluster.sessions import Sessions

_UNKNOWN = RouteRequest(1)
_PREFIX_BLOCKS = 4096
"""Prefix blocks that a replica is taken to keep until it has reported its size."""


@dataclass(frozen=True)
class RoutingSettings:
    """Plain values: they reach the router as JSON.

    Attributes:
        routers: processes that route requests of the same model.
        ttft_ms, tpot_ms: targets of a request that has none of its own.
    """

    policy: Literal["predicted", "load"] = "predicted"
    routers: int = 1
    ttft_ms: float = 2000.0
    tpot_ms: float = 200.0


class Report(ReplicaReport, EngineWords, Protocol):
    """Of a replica: ``cluster.cluster_view.EnginePressure`` is one."""


class Dispatcher:
    """Used by one thread.

    Attributes:
        fleet: what it knows of the replicas.
    """

    def __init__(self, settings: RoutingSettings, rng: random.Random) -> None:
        self.fleet = FleetView()
        self._traffic = Traffic(routers=settings.routers)
        self._index = PrefixIndex(_PREFIX_BLOCKS)
        self._predictor: Predictor | None = None
        self._predicts = settings.policy == "predicted"
        self._taken_s = -math.inf
        self._load = Load(rng, settings.routers)
        self._predicted = PredictedLatency(
            self._known_predictor,
            self._traffic,
            self._index,
            PREFIX_TOKENS,
            rng,
            settings.routers,
            Slo(settings.ttft_ms, settings.tpot_ms),
        )
        self._sessions = Sessions()
        self._news: News = News()
        self._standings: dict[str, Standing] = {}
        self._placed: dict[Route, int] = {}
        """Routes that count on a replica, with the tokens that they have pending there."""

    def present(self, replicas: Collection[str]) -> None:
        """Ray Serve has these now; those of requests that are on their way still are gone."""
        for one, standing in self._standings.items():
            standing.gone = one not in replicas

    def look_at(self, replicas: Sequence[str], reports: Mapping[str, Report], taken_s: float) -> None:
        """Bring the fleet up to date: who is there, and the newest reports, whose ages count from ``taken_s``."""
        self._hear()
        ids = sorted(replicas)  # so that rows stay while the replicas do
        if ids != self.fleet.ids:
            before = self.fleet.index
            self.fleet.keep(ids)
            self._index.move({before[one]: row for one, row in self.fleet.index.items() if one in before})
            self._standings = {one: self._standings.get(one) or Standing(one) for one in ids}
        if taken_s != self._taken_s:
            self._taken_s = taken_s
            self.fleet.take(reports, taken_s)
            self._predictor = common_predictor([reports[one] for one in ids if one in reports])
            if self.fleet.kv_tokens.any():
                self._index.most = max(1, int(self.fleet.kv_tokens.max()) // PREFIX_TOKENS)

    def choose(self, route: Route | None, now_s: float) -> list[str]:
        """All replicas, best first; a route counts on the best of them from here on."""
        if not len(self.fleet):
            return []
        request = self._at_home(route.request) if route is not None else _UNKNOWN
        policy = self._policy(now_s)
        ranking = policy.rank(request, self.fleet, now_s)
        order = list(ranking.order())
        if route is not None:
            order = self._wanted(route, [row for row in order if self.fleet.ids[row] not in route.shut] or order)
            self._remove(route)
            self._place(route, order[0], ranking, now_s)
            policy.sent(request, order[0])
            self._keep_session(route, self.fleet.ids[order[0]])
            route.chosen_s, route.sent_s, route.accepted_s = now_s, math.nan, math.nan
        return [self.fleet.ids[row] for row in order]

    def sent(self, route: Route, replica_id: str, now_s: float) -> None:
        """Ray Serve sends the request to that replica, the best one or a later one of the order."""
        row = self.fleet.index.get(replica_id)
        if row is not None and (route.replica is None or route.replica.replica_id != replica_id):
            self._remove(route)
            self._place(route, row, None, now_s)
            self._keep_session(route, replica_id)
        route.sent_s = now_s

    def accepted(self, route: Route, now_s: float) -> None:
        """The replica has taken the request."""
        route.accepted_s = now_s

    def answers(self, replica_id: str) -> None:
        """The replica has answered a question."""
        standing, row = self._standings.get(replica_id), self.fleet.index.get(replica_id)
        if standing is not None and row is not None and standing.silent_since_s < math.inf:
            standing.silent_since_s = math.inf
            self.fleet.answers(row)

    def silent(self, replica_id: str, since_s: float, now_s: float) -> None:
        """The replica has not answered a question of ``since_s``."""
        standing, row = self._standings.get(replica_id), self.fleet.index.get(replica_id)
        if standing is not None and row is not None:
            standing.silent_since_s = min(standing.silent_since_s, since_s)
            self.fleet.failed(row, now_s)

    def _at_home(self, request: RouteRequest) -> RouteRequest:
        """The request with the row of the replica that had its session, where that is there."""
        home = self._sessions.replica(request.session) if request.session is not None else None
        row = self.fleet.index.get(home) if home is not None else None
        return request if row is None else replace(request, home=row)

    def _keep_session(self, route: Route, replica_id: str) -> None:
        if (session := route.request.session) is not None:
            self._sessions.sent(session, replica_id)

    def _wanted(self, route: Route, order: list[int]) -> list[int]:
        """The replica that the route names comes first, or alone."""
        row = self.fleet.index.get(route.to) if route.to is not None else None
        if row is None:
            return order
        return [row] if route.only else [row, *(one for one in order if one != row)]

    def _policy(self, now_s: float) -> RoutingPolicy:
        known = self._predicts and self._predictor is not None and self.fleet.fresh(now_s).any()
        return self._predicted if known else self._load

    def _known_predictor(self) -> Predictor:
        assert self._predictor is not None  # ``_policy`` has looked
        return self._predictor

    def _place(self, route: Route, row: int, ranking: Ranking | None, now_s: float) -> None:
        """Count the route on a replica; ranking: by which that was chosen, None where Ray Serve has chosen."""
        hits = ranking.hit_tokens[row] if ranking is not None and ranking.hit_tokens is not None else 0.0
        predicted = ranking.predicted if ranking is not None else None
        route.tokens = max(1, route.request.prompt_tokens - int(hits))
        route.predicted_ttft_s = float(predicted.ttft_s[row]) if predicted is not None else math.nan
        route.predicted_tpot_s = float(predicted.tpot_s[row]) if predicted is not None else math.nan
        if math.isnan(route.chosen_s):
            self._traffic.sent(route.tokens, len(self.fleet), now_s)
        self.fleet.sent(row, route.tokens)
        self._placed[route] = route.tokens
        route.replica, route.news = self._standings[self.fleet.ids[row]], self._news
        if route.over:  # it has ended, in another thread, before it had somebody to tell
            self._remove(route)

    def _remove(self, route: Route) -> None:
        """Count the route no longer, where it does."""
        pending = self._placed.pop(route, None)
        row = self.fleet.index.get(route.replica.replica_id) if route.replica is not None else None
        if pending is not None and row is not None:
            self.fleet.ended(row, pending)

    def _hear(self) -> None:
        """Take in what the core has told."""
        while self._news:
            event, route, at_s = self._news.popleft()
            row = self.fleet.index.get(route.replica.replica_id) if route.replica is not None else None
            if event is RouteEvent.ENDED:
                self._remove(route)
                self._traffic.answered(route.output_tokens)
            elif row is not None and event is RouteEvent.FAILED:
                self.fleet.failed(row, at_s)
            elif row is not None and route in self._placed:
                self.fleet.first_token(row, self._placed[route])
                self._placed[route] = 0
