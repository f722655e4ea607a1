"""Kills something of the cluster every now and then, each time when enough streams are in flight."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from http import HTTPStatus

import httpx
import psutil

from benchmarks.chaos.kills import Kill, Kind, Turns, most_streams
from benchmarks.chaos.nodes import Node, Nodes
from benchmarks.chaos.streams import Clients
from benchmarks.chaos.view import Engine, Snapshot, View, back_after
from cluster.app import API_DEPLOYMENT, APP_NAME
from memory_agent.reports import replica_name

STREAMS_LEAST = 4
_LOOK_S = 0.2
_PATIENCE_S = 120.0
"""For enough streams, and a victim that has some; then that turn is skipped."""


class Killer:
    """Args:
    replicas: that there are when all is well. began_s: of the run, on the monotonic clock.

    Attributes:
        kills: that were done. skipped: turns in which there was no victim.
    """

    def __init__(
        self, nodes: Nodes, view: View, clients: Clients, replicas: int, began_s: float, said: Callable[[str], None]
    ) -> None:
        self._nodes, self._view, self._clients, self._replicas = nodes, view, clients, replicas
        self._began_s, self._said = began_s, said
        self._draining: str | None = None
        self._killed_s = began_s
        self.kills: list[Kill] = []
        self.skipped: list[Kind] = []

    async def run(self, turns: Turns, every_s: float, seconds: float) -> None:
        """Until so much time has passed since the run began."""
        while (due_s := time.monotonic() + every_s) < self._began_s + seconds:
            await asyncio.sleep(due_s - time.monotonic())
            await self._end_drain()
            self._clients.may_cut = any(one.kind is Kind.INGRESS and one.recovered_s is None for one in self.kills)
            kind = next(turns)
            if not await self._turn(kind):
                self.skipped.append(kind)
                self._said(f"no victim for {kind} within {_PATIENCE_S:.0f} s")
        await self._end_drain()

    @property
    def _in_flight(self) -> int:
        """Streams that have had a token since the last kill, so that each of them has survived that one."""
        return self._clients.in_flight(self._killed_s)

    async def _turn(self, kind: Kind) -> bool:
        deadline_s = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline_s:
            now = self._view.now
            if now is not None and self._in_flight >= STREAMS_LEAST and await self._kill(kind, now):
                return True
            await asyncio.sleep(_LOOK_S)
        return False

    async def _kill(self, kind: Kind, now: Snapshot) -> bool:
        """False where there is nothing of that kind to kill now."""
        if kind is Kind.CONTROLLER:
            return self._done(kind, now, "", f"process {now.controller_pid}", None, [now.controller_pid])
        if kind is Kind.INGRESS:
            pid = self._ingress()
            if pid is None:
                return False
            self._clients.may_cut = True
            return self._done(kind, now, "", f"process {pid}", None, [pid])
        busiest = most_streams({one.engine_id: one.requests for one in now.engines.values()}, now.engines)
        if busiest is None:
            return False
        engine = now.engines[busiest]
        node = self._nodes.node_of(engine.pid)
        if node is None:
            return False
        victim = f"{replica_name(engine.engine_id)} on {node.name}"
        if kind is Kind.AGENT:
            pid = now.agents[engine.node]
            return self._done(kind, now, engine.node, f"of {node.name}, process {pid}", None, [pid])
        if kind is Kind.ENGINE:
            return self._done(kind, now, engine.engine_id, victim, engine.requests, [engine.pid])
        if kind is Kind.REPLICA:
            replica = _parent(engine.pid)
            return replica is not None and self._done(kind, now, engine.engine_id, victim, engine.requests, [replica])
        if kind is Kind.DRAIN:
            return await self._drain(now, engine, victim)
        there = [one for one in now.engines.values() if one.node == engine.node]
        hit = sum(one.requests for one in there)
        self._done(kind, now, engine.node, f"{node.name} with {len(there)} replicas", hit)
        await asyncio.to_thread(self._replace, node)
        return True

    def _done(
        self, kind: Kind, before: Snapshot, gone: str, victim: str, hit: int | None, pids: "list[int] | None" = None
    ) -> bool:
        """Kill ``pids``, and note it. False where one of them is dead already."""
        kill = Kill(kind, time.monotonic() - self._began_s, victim, hit, self._in_flight)
        for pid in pids or []:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                return False
        self.kills.append(kill)
        self._killed_s = time.monotonic()
        had = f", which had {hit} requests" if hit is not None else ""
        self._said(f"{kind} {victim}{had}; {kill.in_flight} streams in flight")
        self._view.expect(kill, back_after(kind, before, gone, self._replicas))
        return True

    def _replace(self, node: Node) -> None:
        self._nodes.kill(node)
        self._nodes.add_worker()

    async def _drain(self, now: Snapshot, engine: Engine, victim: str) -> bool:
        if not await self._tell(engine.engine_id, undo=False):
            return False
        self._draining = engine.engine_id
        return self._done(Kind.DRAIN, now, engine.engine_id, victim, engine.requests)

    async def _end_drain(self) -> None:
        if self._draining is not None:
            await self._tell(self._draining, undo=True)  # one that has been killed meanwhile is not known any more
            self._draining = None

    async def _tell(self, engine_id: str, undo: bool) -> bool:
        try:
            async with httpx.AsyncClient(timeout=10.0, trust_env=False) as http:
                body = {"target": engine_id, "undo": undo}
                answer = await http.post(f"{self._nodes.url}/ellm/drain", json=body)
        except httpx.TransportError:
            return False
        return answer.status_code == HTTPStatus.ACCEPTED

    def _ingress(self) -> int | None:
        name = f"ServeReplica:{APP_NAME}:{API_DEPLOYMENT}"
        return next((one.pid for one in self._nodes.head.processes() if name in _command(one)), None)


def _parent(pid: int) -> int | None:
    """The replica of an engine."""
    try:
        return int(psutil.Process(pid).ppid())
    except psutil.NoSuchProcess:
        return None


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
