"""The Ray Serve request router: load and memory pressure decide which replica gets a request.

Ray Serve ships this module to every process that holds a handle, by value: keep module state out of it.
"""

import random
import time
from collections import Counter, deque
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from cluster.fleet_view import FleetView
from cluster.pressure_view import PressureFollower
from cluster.routing_policy import Load, RouteRequest

CHOICE_LIFE_S = 0.1


class PressureRouter(RequestRouter):
    """Ranks the replicas by ``cluster.routing_policy.Load``; without a controller by its own count of requests in
    flight."""

    def initialize_state(self, **kwargs: Any) -> None:
        self._in_flight: Counter[str] = Counter()
        self._chosen: deque[tuple[float, str]] = deque()
        self._follower = PressureFollower()
        self._fleet = FleetView()
        self._policy = Load(random.Random())

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Each replica as a rank of its own, best first: Ray Serve takes the first that accepts."""
        self._follower.start()
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # when every replica has refused
        now_s = time.monotonic()
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if not replicas:
            return []
        self._forget_choices(now_s)
        self._look_at(list(replicas))
        # Which prompt it is plays no part in this policy, so what Ray Serve has of it is not looked into.
        order = [self._fleet.ids[row] for row in self._policy.rank(RouteRequest(1), self._fleet, now_s).order()]
        self._chosen.append((now_s, order[0]))
        return [[replicas[replica_id]] for replica_id in order]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._in_flight[replica_id.unique_id] += 1
        sent = next((choice for choice in self._chosen if choice[1] == replica_id.unique_id), None)
        if sent is not None:
            self._chosen.remove(sent)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        super().on_request_completed(replica_id, internal_request_id)
        if self._in_flight[replica_id.unique_id] > 0:
            self._in_flight[replica_id.unique_id] -= 1

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._in_flight.pop(replica_id.unique_id, None)

    def _look_at(self, ids: list[str]) -> None:
        """Bring the fleet up to date: who is there, the newest reports, what is in flight from here."""
        fleet = self._fleet
        fleet.keep(ids)
        fleet.take(self._follower.reports, self._follower.taken_s)
        chosen = Counter(replica_id for _, replica_id in self._chosen)
        fleet.in_flight[:] = [self._in_flight[replica_id] + chosen[replica_id] for replica_id in ids]

    def _forget_choices(self, now_s: float) -> None:
        """Requests that choose at the same moment must not all see the same idle replica: a choice counts until it
        is sent."""
        while self._chosen and now_s - self._chosen[0][0] > CHOICE_LIFE_S:
            self._chosen.popleft()
