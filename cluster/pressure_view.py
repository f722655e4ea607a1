"""The controller's view of the engines, followed by a long poll, for a process that routes requests."""

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from memory_agent.controller_link import CONTROLLER_NAME, NAMESPACE
from memory_agent.reports import PressureLevel

if TYPE_CHECKING:
    from cluster.cluster_view import PressureView

logger = logging.getLogger("ray.serve")

WATCH_TIMEOUT_S = 1.0
RETRY_PERIOD_S = 0.5
STALE_AFTER_S = 3.0


@dataclass(frozen=True)
class EngineLoad:
    """What is known of one engine. ``seen_s`` is on the monotonic clock of this process."""

    pressure: PressureLevel
    running: int
    waiting: int
    seen_s: float


class PressureFollower:
    """Keeps the newest view. What is older than STALE_AFTER_S reads as absent."""

    def __init__(self) -> None:
        self._engines: dict[str, EngineLoad] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Follow the controller from the running event loop; a second call changes nothing."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._follow())

    def load_of(self, engine_id: str, now_s: float) -> EngineLoad | None:
        """The engine's load, or None where nothing recent is known."""
        load = self._engines.get(engine_id)
        return load if load is not None and now_s - load.seen_s <= STALE_AFTER_S else None

    def take(self, view: "PressureView", now_s: float) -> None:
        """Replace what is known by ``view``, received at ``now_s``; ages in it count from then."""
        self._engines = {
            engine_id: EngineLoad(engine.level, engine.running, engine.waiting, now_s - engine.age_s)
            for engine_id, engine in view.engines.items()
        }

    async def _follow(self) -> None:
        controller: Any = None
        revision = 0
        while True:
            try:
                controller = controller or await asyncio.to_thread(ray.get_actor, CONTROLLER_NAME, namespace=NAMESPACE)
                view = await controller.watch.remote(revision, WATCH_TIMEOUT_S)
                revision = view.revision
                self.take(view, time.monotonic())
            except (RayError, ValueError) as error:
                # The controller is away. What is known ages out; a new life of it may number its views from the
                # start.
                controller, revision = None, 0
                logger.debug("no pressure view: %s", error)
                await asyncio.sleep(RETRY_PERIOD_S)
