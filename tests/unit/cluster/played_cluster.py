"""Replicas of engine models behind a real door, on a virtual clock: an ingress and its replicas without HTTP."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.bench.report import Slo
from cluster.config import SloClass
from cluster.door import Door
from cluster.request_slo import Part, RequestSlo
from cluster.simulator.arrivals import Arrival
from cluster.slo import Ending, SloAccount, class_targets
from replicas.decode_batch import EngineRequest
from replicas.engine_model import EngineModel
from replicas.engine_profile import EngineProfile

_EPSILON_S = 1e-9


@dataclass(eq=False)
class _Replica:
    """since_s: of the run of steps under way; steps_per_s: of it."""

    name: str
    engine: EngineModel
    since_s: float = 0.0
    steps_per_s: float = 0.0
    has: dict[EngineRequest, tuple[Part, "asyncio.Future[None]"]] = field(default_factory=dict)


class PlayedCluster:
    """Belongs to the virtual loop it is built on. Each request goes to the replica with the fewest."""

    def __init__(self, profile: EngineProfile, replicas: int, door: Door, classes: Sequence[SloClass]) -> None:
        self.account = SloAccount()
        self._door = door
        self._classes = {one.name: one for one in classes}
        self._replicas = [_Replica(f"r{n}", EngineModel(profile)) for n in range(replicas)]
        self._loop = asyncio.get_running_loop()

    def slow_down(self, slowness: float) -> None:
        """The first replica's steps take so many times as long."""
        self._replicas[0].engine.slowness = slowness

    async def serve(self, come: Sequence[Arrival]) -> None:
        """All of them, each at its time, until the last one has ended."""
        async with asyncio.TaskGroup() as tasks:
            for number, arrival in enumerate(come):
                await asyncio.sleep(max(0.0, arrival.at_s - self._loop.time()))
                tasks.create_task(self._request(number, arrival))

    async def _request(self, number: int, arrival: Arrival) -> None:
        slo_class = self._classes[arrival.slo_class]
        targets: Slo = class_targets(slo_class)
        request = RequestSlo(slo_class, targets, self._loop.time(), arrival.tenant)
        part = Part(arrival.prompt_tokens, stop=lambda: None)
        request.add(part)
        ending = Ending.REJECTED
        if await self._door.enter(part):
            await self._run(number, arrival, part)
            ending = Ending.ANSWERED
        self.account.add(request.outcome("m", ending))

    async def _run(self, number: int, arrival: Arrival, part: Part) -> None:
        replica = min(self._replicas, key=lambda one: len(one.has))
        one = EngineRequest(number, arrival.prompt_tokens, arrival.output_tokens, arrival.prefix)
        done = self._loop.create_future()
        replica.has[one] = part, done
        replica.engine.submit(one, self._loop.time())
        self._follow(replica)
        await done
        part.tokens = arrival.output_tokens
        self._door.ended(part)

    def _follow(self, replica: _Replica) -> None:
        now_s = self._loop.time()
        steps = round((now_s - replica.since_s) * replica.steps_per_s)
        for part, _done in replica.has.values():
            part.tokens += steps * part.has_begun
        step = replica.engine.last_step()
        replica.since_s, replica.steps_per_s = now_s, 1 / step[1] if step is not None else 0.0
        if (at_s := replica.engine.next_event_s) < math.inf:
            self._loop.call_at(at_s, self._advance, replica)

    def _advance(self, replica: _Replica) -> None:
        if replica.engine.next_event_s > self._loop.time() + _EPSILON_S:
            return
        progress = replica.engine.advance()
        for one in progress.started:
            replica.has[one][0].tokens = 1
            self._door.began(replica.has[one][0], replica.name)
        for one in progress.finished:
            replica.has.pop(one)[1].set_result(None)
        self._follow(replica)
