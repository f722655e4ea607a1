"""The KV of a request that moves from one node to another: the memory agent of the node that it goes to fetches it.

    bring(origin) --fetch--> destination's agent --staged--> source's agent

What fails leaves no KV at the destination that is not whole; the agents forget by themselves, later, what they are not
told to.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from ray.exceptions import RayError

from replicas.replica import ReplicaStats

AHEAD_S = 8.0
"""For what is staged ahead: less than a round may take at the source."""
SWITCH_S = 2.0
"""For the last blocks, while the client waits."""
_ANSWER_S = 1.0

CallAgent = Callable[..., Awaitable[Any]]
"""Calls an agent by its name, a method and arguments: ``memory_agent.agent_calls.AgentCalls``."""


class CrossingError(Exception):
    """The KV is not there."""


class Crossing:
    """Of one migration. source, destination: names of agents."""

    def __init__(self, call: CallAgent, source: str, destination: str, move: str) -> None:
        self._call, self._source, self._destination, self._move = call, source, destination, move
        self._begun = False

    async def bring(self, origin: str, within_s: float, until: str = "") -> str:
        """Have what is staged at ``origin`` at the destination's node. Returns the origin that it has there.

        until: key of a block that is among it or will be in a moment, in hexadecimal.

        Raises CrossingError.
        """
        self._begun = True
        fetch = self._call(self._destination, "fetch", self._source, origin, self._move, bytes.fromhex(until), within_s)
        try:
            there: str = await asyncio.wait_for(fetch, within_s + _ANSWER_S)
            return there
        except TimeoutError:
            raise CrossingError(f"{self._destination} does not answer") from None
        except (RayError, ValueError) as error:
            raise CrossingError(f"{self._destination} has not got it: {str(error).strip().splitlines()[-1]}") from error

    async def end(self) -> None:
        """Nothing is held at the destination's node any more. Never fails."""
        if not self._begun:
            return
        try:
            await asyncio.wait_for(self._call(self._destination, "forget", self._move), _ANSWER_S)
        except (RayError, ValueError, TimeoutError):
            return


class Crossings:
    """Of one core. replicas: as they answered last."""

    def __init__(self, replicas: Callable[[], Iterable[ReplicaStats]], call: CallAgent) -> None:
        self._replicas, self._call = replicas, call

    def between(self, source: str, destination: str, move: str) -> Crossing | None:
        """For a migration between these replicas. None on one node, or where that of one is not known, or one has no
        agent: its engine moves no request."""
        ends = {one.engine_id: one for one in self._replicas() if one.engine_id in (source, destination)}
        if len(ends) < 2 or len({one.node_id for one in ends.values()}) < 2:
            return None
        if not all(one.agent for one in ends.values()):
            return None
        return Crossing(self._call, ends[source].agent, ends[destination].agent, move)
