"""What the cluster says of itself, read twice a second, and when what was killed is there again."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.chaos.kills import Kill, Kind

_PERIOD_S = 0.5
_TIMEOUT_S = 5.0
_SETTLE_S = 60.0


@dataclass(frozen=True)
class Engine:
    """One that is live. ``pid``: of its EngineCore; ``requests``: running and waiting there."""

    engine_id: str
    pid: int
    node: str
    requests: int
    used_bytes: int
    conservation_failures: int


@dataclass(frozen=True)
class Snapshot:
    """One answer of ``/ellm/status``. ``agents``: their processes, by Ray's id of the node."""

    controller_pid: int
    agents: dict[str, int]
    engines: dict[str, Engine]

    @classmethod
    def of(cls, status: dict[str, Any]) -> "Snapshot":
        devices = [(node["node"], device) for node in status["nodes"] for device in node["devices"]]
        engines = {
            one["engine_id"]: Engine(
                one["engine_id"],
                one["pid"],
                node,
                one["running"] + one["waiting"],
                one["used_bytes"],
                one["conservation_failures"],
            )
            for node, device in devices
            for one in device["replicas"]
            if one["state"] == "LIVE"
        }
        return cls(status["controller_pid"], {node: device["agent_pid"] for node, device in devices}, engines)


Back = Callable[[Snapshot], bool]


@dataclass
class View:
    """Follows the API at ``url``.

    Attributes:
        now: the last answer; None where the last question had none.
        conservation_failures: by engine.
    """

    url: str
    said: Callable[[str], None]
    now: Snapshot | None = None
    conservation_failures: dict[str, int] = field(default_factory=dict)
    _away: list[tuple[Kill, float, Back]] = field(default_factory=list)

    def expect(self, kill: Kill, back: Back) -> None:
        """Note when ``back`` is true of a snapshot that was asked for from now on."""
        self._away.append((kill, time.monotonic(), back))

    async def run(self) -> None:
        """For ever."""
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False) as http:
            while True:
                asked_s = time.monotonic()
                self.now = await self._ask(http)
                if self.now is not None:
                    self._note(self.now, asked_s)
                await asyncio.sleep(_PERIOD_S)

    async def until(self, reached: Callable[[Snapshot], bool], within_s: float) -> bool:
        """False where it was not, in that time."""
        deadline_s = time.monotonic() + within_s
        while self.now is None or not reached(self.now):
            if time.monotonic() > deadline_s:
                return False
            await asyncio.sleep(_PERIOD_S)
        return True

    async def all_back(self) -> bool:
        """Everything that was killed has come back, within a while."""
        return await self.until(lambda _: not self._away, _SETTLE_S)

    def _note(self, snapshot: Snapshot, asked_s: float) -> None:
        for engine in snapshot.engines.values():
            known = self.conservation_failures.get(engine.engine_id, 0)
            self.conservation_failures[engine.engine_id] = max(known, engine.conservation_failures)
        for one in list(self._away):
            kill, killed_s, back = one
            if asked_s > killed_s and back(snapshot):
                kill.recovered_s = time.monotonic() - killed_s
                self._away.remove(one)
                self.said(f"{kill.kind} is back after {kill.recovered_s:.1f} s")

    async def _ask(self, http: httpx.AsyncClient) -> Snapshot | None:
        try:
            answer = await http.get(f"{self.url}/ellm/status")
            return Snapshot.of(answer.json()) if answer.status_code == httpx.codes.OK else None
        except (httpx.TransportError, ValueError, LookupError):
            return None


def back_after(kind: Kind, before: Snapshot, victim: str, replicas: int) -> Back:
    """When what was killed is there again. victim: an engine's id, a node's id, nothing for what there is one of."""

    def agent(now: Snapshot) -> bool:
        return now.agents.get(victim, before.agents[victim]) != before.agents[victim]

    def engines(now: Snapshot) -> bool:
        gone = {victim} | {one.engine_id for one in before.engines.values() if one.node == victim}
        return len(now.engines.keys() - gone) >= replicas

    return {
        Kind.AGENT: agent,
        Kind.CONTROLLER: lambda now: now.controller_pid != before.controller_pid,
        Kind.DRAIN: lambda now: True,
        Kind.INGRESS: lambda now: True,
    }.get(kind, engines)
