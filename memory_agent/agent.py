"""The memory agent: a Ray actor beside each device that plans leases and reports pressure.

It is a thin shell around LeaseKeeper. Its hard state is the lease board, a file in shared memory, so its death costs
nothing but time: engines go on with their last lease, Ray starts it again, and it goes on from the same file. KV of
requests that move between nodes goes through it too (``Courier``).
"""

import asyncio
import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from memory_agent.agent_calls import AgentCalls
from memory_agent.controller_link import ControllerLink
from memory_agent.courier import Courier
from memory_agent.device_report import DeviceReporter
from memory_agent.durable_actor import ensure_actor
from memory_agent.errors import SettingsError
from memory_agent.lease_keeper import LeaseKeeper
from memory_agent.mirror import Staged
from memory_agent.reports import DeviceReport
from memory_agent.tenant import EngineTerms

_TICK_S = 0.05
_REPORT_EVERY_S = 0.25
_GRANT_TIMEOUT_S = 10.0
"""How long ``register`` waits for other engines to give back what the new one is sure to get."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AgentSpec:
    """What an agent is made from.

    Attributes:
        cluster_id: tells the boards of clusters on one host apart; device: for example ``cpu`` or ``gpu0``.
        budget_bytes: KV bytes that the engines of the device share, until ``set_budget`` says otherwise.
        weights_bytes: likewise, set aside for their weights beside the budget.
        fetch_bytes_s: most bytes of KV a second that come from other nodes; None for no bound.
    """

    cluster_id: str
    device: str
    budget_bytes: int
    weights_bytes: int = 0
    fetch_bytes_s: int | None = None

    def __post_init__(self) -> None:
        for name in (self.cluster_id, self.device):
            if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
                raise SettingsError(f"{name!r} becomes part of a file name: 1 to 64 of A-Z a-z 0-9 _ . - fit")
        if self.budget_bytes <= 0:
            raise SettingsError(f"the KV budget of {self.device} is {self.budget_bytes} bytes; it must be above 0")


@dataclass(frozen=True)
class Registration:
    """Where an engine finds its lease: the board's file and its row."""

    board_path: str
    row: int


def board_path(spec: AgentSpec) -> Path:
    """The lease board's file on the device's node."""
    return Path(f"/dev/shm/ellm-{spec.cluster_id}-{spec.device}.board")


def agent_name(node_id: str, device: str) -> str:
    """The actor's name in the namespace ``ellm``."""
    return f"ellm-agent-{node_id}-{device}"


def ensure_agent(spec: AgentSpec, node_id: str | None = None) -> ActorHandle[Any]:
    """The agent of a device, started where there is none. node_id: Ray's id of the node, by default this one.

    A running agent keeps its budget whatever ``spec`` says; ``set_budget`` changes it. Does not wait for the start.
    """
    node_id = node_id or ray.get_runtime_context().get_node_id()
    return ensure_actor(MemoryAgent, agent_name(node_id, spec.device), node_id, spec, node_id, soft=False)


class MemoryAgent:
    """Actor methods. Calls are run again when the actor died under them, so each may run twice: all are idempotent."""

    async def __init__(self, spec: AgentSpec, node_id: str) -> None:  # type: ignore[misc]  # Ray awaits it
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
        self._keeper = LeaseKeeper(board_path(spec), spec.budget_bytes, spec.weights_bytes)
        self._reporter = DeviceReporter(node_id, spec.device, os.getpid(), time.time_ns())
        self._link = ControllerLink()
        self._calls = AgentCalls()
        self._courier = Courier(board_path(spec), self._ask_staged, spec.fetch_bytes_s)
        self._tasks = [asyncio.create_task(work) for work in (self._keep(), self._link.run(), self._courier.run())]
        for task in self._tasks:
            task.add_done_callback(_die_with)

    async def register(
        self,
        engine_id: str,
        model: str,
        guarantee_bytes: int,
        ceiling_bytes: int,
        weights_bytes: int,
        registrar_pid: int,
        weight: float = 1.0,
        start_bytes: int = 0,
    ) -> Registration:
        """Give the engine a row, and wait until its limit has reached its guarantee and its start, at most ten seconds.

        The engine reads its limit from the row and commits no byte beyond it; where another engine does not give back
        in time (a stopped process holds its bytes), or another start goes first, the limit gets there later. The
        engine's processes must not be started before it holds ``start_bytes``. The same engine_id again returns the row
        it has. Raises SettingsError, with the numbers that would fit.
        """
        terms = EngineTerms(
            engine_id, model, guarantee_bytes, ceiling_bytes, weights_bytes, registrar_pid, weight, start_bytes
        )
        row = self._keeper.register(terms)
        least_bytes, deadline_s = max(guarantee_bytes, start_bytes), time.monotonic() + _GRANT_TIMEOUT_S
        while row.lease.limit_bytes < least_bytes and row.engine_id == engine_id:
            if time.monotonic() > deadline_s:
                limit_bytes = row.lease.limit_bytes
                logger.warning("engine %s has %d of the %d bytes it was to get", engine_id, limit_bytes, least_bytes)
                break
            await asyncio.sleep(_TICK_S)
        return Registration(str(self._keeper.board.path), row.index)

    async def unregister(self, engine_id: str) -> None:
        """Call before the engine is stopped: its exit then counts as no death. Unknown engines change nothing."""
        self._keeper.unregister(engine_id)

    async def report(self) -> DeviceReport:
        """The device now."""
        return self._reporter.sample(self._keeper, time.time())

    async def set_budget(self, budget_bytes: int, weights_bytes: int | None = None) -> None:
        """KV bytes the engines share from now on, and those set aside for their weights where these change, kept across
        restarts. Raises SettingsError below what the engines are sure to get."""
        self._keeper.set_budget(budget_bytes, weights_bytes)

    async def set_limits(self, engine_id: str, guarantee_bytes: int, ceiling_bytes: int) -> None:
        """What one engine can always get and may hold at most. Raises SettingsError for an unknown engine, a ceiling
        below the guarantee, and guarantees that do not fit the budget."""
        self._keeper.set_limits(engine_id, guarantee_bytes, ceiling_bytes)

    async def describe(self) -> dict[str, Any]:
        """Who and where this agent is, JSON-ready."""
        board = self._keeper.board
        return {
            "pid": os.getpid(),
            "board_path": str(board.path),
            "budget_bytes": board.budget_bytes,
            "weights_bytes": board.weights_bytes,
            "engines": [tenant.engine_id for tenant in self._keeper.tenants],
        }

    async def staged(self, origin: str, rank: int, known: list[bytes], wait_s: float = 0.0) -> Staged:
        """Asked by the agent of another node: see ``Courier.staged``."""
        return await self._courier.staged(origin, rank, known, wait_s)

    async def fetch(self, source: str, origin: str, move: str, until: bytes, within_s: float) -> str:
        """Asked by whoever moves a request to this node: see ``Courier.fetch``. source: the other node's agent."""
        return await self._courier.fetch(source, origin, move, until, within_s)

    async def forget(self, move: str) -> None:
        """What was fetched for this migration is needed no more."""
        await self._courier.forget(move)

    async def _ask_staged(self, agent: str, origin: str, rank: int, known: list[bytes], wait_s: float) -> Staged:
        staged: Staged = await self._calls(agent, "staged", origin, rank, known, wait_s)
        return staged

    async def _keep(self) -> None:
        report_at_s = 0.0
        while True:
            now_s = time.monotonic()
            if self._keeper.tick(now_s) or now_s >= report_at_s:
                self._link.offer(self._reporter.sample(self._keeper, time.time()), now_s)
                report_at_s = now_s + _REPORT_EVERY_S
            await asyncio.sleep(_TICK_S)


def _die_with(task: "asyncio.Task[None]") -> None:
    """End this process when a task of its own failed: Ray starts the agent again, and it goes on from the board. An
    agent that answers calls but keeps no leases would be worse."""
    if not task.cancelled():
        logger.error("the memory agent stops, its own task failed", exc_info=task.exception())
        logging.shutdown()
        os._exit(1)
