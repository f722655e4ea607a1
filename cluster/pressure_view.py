"""The controller's view of the engines, followed by a long poll, for a process that routes requests."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from memory_agent.controller_link import CONTROLLER_NAME, NAMESPACE

if TYPE_CHECKING:
    from cluster.cluster_view import EnginePressure, PressureView

logger = logging.getLogger("ray.serve")

WATCH_TIMEOUT_S = 1.0
RETRY_PERIOD_S = 0.5


class PressureFollower:
    """Keeps the newest view.

    Args:
        heard: called with each view that comes.

    Attributes:
        reports: of each engine in it; their ages count from ``taken_s``, monotonic.
    """

    def __init__(self, heard: "Callable[[PressureView], None] | None" = None) -> None:
        self._heard = heard
        self.reports: Mapping[str, EnginePressure] = {}
        self.taken_s = -math.inf
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Follow the controller from the running event loop; a second call changes nothing."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._follow())

    def take(self, view: "PressureView", now_s: float) -> None:
        """Replace what is known by ``view``, received at ``now_s``; ages in it count from then."""
        self.reports, self.taken_s = view.engines, now_s
        if self._heard is not None:
            self._heard(view)

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
