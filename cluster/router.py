"""The Ray Serve request router: asks the dispatcher of its process which replica gets a request.

Ray Serve ships this module to every process that holds a handle, by value: keep module state out of it.
"""

import asyncio
import random
import time
from typing import Any

from ray.exceptions import RayError
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from cluster.dispatcher import Dispatcher, RoutingSettings
from cluster.pressure_view import PressureFollower
from cluster.route import Route

ASK_PERIOD_S = 1.0
ASK_TIMEOUT_S = 2.0


class NotedReplica(RunningReplica):
    """A replica of which the router notes what Ray Serve sends to it."""

    dispatcher: Dispatcher

    def try_send_request(self, pr: PendingRequest, with_rejection: bool) -> Any:
        result = super().try_send_request(pr, with_rejection)
        if (route := _route_of(pr)) is not None:
            self.dispatcher.sent(route, self.replica_id.unique_id, time.monotonic())
        return result


class PressureRouter(RequestRouter):
    """Ranks the replicas by ``cluster.dispatcher``. Once a request has come it also asks every replica every second for
    its queue's length, to leave out soon those that do not answer."""

    def initialize_state(self, **kwargs: Any) -> None:
        """kwargs: fields of ``RoutingSettings``."""
        self._follower = PressureFollower()
        self._dispatcher = Dispatcher(RoutingSettings(**kwargs), random.Random())
        self._asking: asyncio.Task[None] | None = None

    def create_replica_wrapper(self, replica_info: Any) -> RunningReplica:
        replica = NotedReplica(replica_info)
        replica.dispatcher = self._dispatcher
        return replica

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._dispatcher.present({replica.replica_id.unique_id for replica in replicas})

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Each replica as a rank of its own, best first: Ray Serve takes the first that accepts."""
        self._start()
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # when every replica has refused
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        self._dispatcher.look_at(list(replicas), self._follower.reports, self._follower.taken_s)
        route = _route_of(pending_request) if pending_request is not None else None
        return [[replicas[replica_id]] for replica_id in self._dispatcher.choose(route, time.monotonic())]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        super().on_request_routed(pending_request, replica_id, result)
        if (route := _route_of(pending_request)) is not None:
            self._dispatcher.accepted(route, time.monotonic())

    def _start(self) -> None:
        """Follow the controller and ask the replicas, from the running event loop; a second call changes nothing."""
        self._follower.start()
        if self._asking is None or self._asking.done():
            self._asking = asyncio.get_running_loop().create_task(self._ask_all())

    async def _ask_all(self) -> None:
        while True:
            await asyncio.gather(*(self._ask(replica) for replica in self.curr_replicas.values()))
            await asyncio.sleep(ASK_PERIOD_S)

    async def _ask(self, replica: RunningReplica) -> None:
        asked_s, name = time.monotonic(), replica.replica_id.unique_id
        try:
            await asyncio.wait_for(replica.get_queue_len(deadline_s=ASK_TIMEOUT_S), ASK_TIMEOUT_S)
        except TimeoutError:
            now_s = time.monotonic()
            if now_s - asked_s < 2 * ASK_TIMEOUT_S:  # else this process has stood still, and the answer may be there
                self._dispatcher.silent(name, asked_s, now_s)
        except RayError:  # it has died, which Ray Serve finds out by itself
            return
        else:
            self._dispatcher.answers(name)


def _route_of(request: PendingRequest) -> Route | None:
    """What the core has said of the request; None for a call that is none."""
    route = request.kwargs.get("route")
    return route if isinstance(route, Route) else None
