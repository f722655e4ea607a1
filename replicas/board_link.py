"""A replica's tie to the memory agent and the controller: its row on the lease board, and the targets it writes
there."""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from memory_agent.controller_link import CONTROLLER_NAME, NAMESPACE
from memory_agent.lease_board import EngineWord, LeaseBoard, ReplicaWord, Row
from replicas.lease_watch import WakePolicy, watch_lease
from replicas.spec import EngineSpec
from replicas.targets import ReplicaTarget

if TYPE_CHECKING:
    from memory_agent.agent import AgentSpec, Registration

logger = logging.getLogger("ray.serve")

TARGET_PERIOD_S = 1.0
UNREGISTER_TIMEOUT_S = 2.0
LEASE_POLL_S = 0.05
SAY_AGAIN_S = 10.0


class BoardLink:
    """One engine's registration. Construction registers the engine and returns when its lease holds what its start
    takes; it raises what the agent raises where that can never be."""

    def __init__(self, engine_id: str, spec: EngineSpec, agent_spec: "AgentSpec") -> None:
        from memory_agent.agent import ensure_agent

        self.engine_id = engine_id
        self._agent = ensure_agent(agent_spec)
        answer: Any = ray.get(
            self._agent.register.remote(
                engine_id=engine_id,
                model=spec.model_name,
                guarantee_bytes=spec.guarantee_bytes,
                ceiling_bytes=spec.ceiling_bytes,
                weights_bytes=spec.weights_bytes,
                registrar_pid=os.getpid(),
                weight=spec.weight,
                start_bytes=spec.start_bytes,
            )
        )
        self.registration: Registration = answer
        self._row: Row = LeaseBoard.open(Path(self.registration.board_path)).row(self.registration.row)
        wait_for_lease(self._row, spec.start_bytes)

    async def follow_lease(self, wake: Callable[[], Awaitable[object]]) -> None:
        """Wake the engine by ``wake`` when its lease has changed or its rest has come; for ever."""
        await watch_lease(self._row, wake, WakePolicy())

    async def follow_targets(self) -> None:
        """Fetch the controller's target once a second and write it to the row; for ever. Without a controller the
        last stays."""
        controller: Any = None
        while True:
            started_s = time.monotonic()
            try:
                controller = controller or await asyncio.to_thread(_controller)
                target = await controller.target_for.remote(self.engine_id)
                if target is not None:
                    self.apply(target)
            except (RayError, ValueError) as error:  # no such actor now: it is being restarted, or nobody started one
                controller = None
                logger.debug("no target for %s: %s", self.engine_id, error)
            await asyncio.sleep(max(0.0, started_s + TARGET_PERIOD_S - time.monotonic()))

    def apply(self, target: ReplicaTarget) -> None:
        """Write ``target`` where the engine reads it each step. One that is not newer changes nothing."""
        if target.revision <= self._row.get(ReplicaWord.TARGET_REVISION):
            return
        self._row.set(ReplicaWord.TOKEN_BUDGET_MAX, target.token_budget_max)
        self._row.set(ReplicaWord.ACTIVE_MAX, target.active_max)
        # The revision last: who reads it sees the bounds that belong to it, or newer ones.
        self._row.set(ReplicaWord.TARGET_REVISION, target.revision)

    def engine_words(self) -> dict[str, float]:
        """What the engine has written of its steps and requests, named as in ``ReplicaDemand``."""
        row = self._row
        return {
            "kv_tokens": row.get(EngineWord.KV_TOKENS),
            "step_s": row.get_float(EngineWord.STEP_S),
            "row_s": row.get_float(EngineWord.ROW_S),
            "kv_token_s": row.get_float(EngineWord.KV_TOKEN_S),
            "token_s": row.get_float(EngineWord.TOKEN_S),
            "pair_s": row.get_float(EngineWord.PAIR_S),
        }

    def close(self) -> None:
        """Give the row back. An agent that is away learns of the engine's end from its processes."""
        try:
            ray.get(self._agent.unregister.remote(self.engine_id), timeout=UNREGISTER_TIMEOUT_S)
        except RayError as error:
            logger.info("%s was not unregistered: %s", self.engine_id, error)


def wait_for_lease(row: Row, least_bytes: int) -> None:
    """Return when the row's lease is ``least_bytes`` or more, however long neighbours keep them: an engine loads its
    weights and maps its first KV memory before it reads any lease."""
    began_s = time.monotonic()
    said_s = float("-inf")
    while (limit_bytes := row.lease.limit_bytes) < least_bytes:
        if time.monotonic() - said_s >= SAY_AGAIN_S:
            said_s = time.monotonic()
            logger.warning(
                "engine %s has waited %.0f s to start: its lease is %d bytes, its start takes %d; other engines of the "
                "device have to give back what was lent to them, or to finish their own start",
                row.engine_id,
                said_s - began_s,
                limit_bytes,
                least_bytes,
            )
        time.sleep(LEASE_POLL_S)
    if said_s > began_s:
        logger.warning("engine %s starts, after %.1f s", row.engine_id, time.monotonic() - began_s)


def _controller() -> Any:
    return ray.get_actor(CONTROLLER_NAME, namespace=NAMESPACE)
