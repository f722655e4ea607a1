"""Sends reports to the controller, wherever it is and whether it is there or not."""

import asyncio
import logging
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from memory_agent.reports import DeviceReport

CONTROLLER_NAME = "ellm-controller"
NAMESPACE = "ellm"
_RETRY_S = 0.5
_REPEAT_S = 1.0

logger = logging.getLogger(__name__)


class ControllerLink:
    """Holds one report, the newest. At most one is on its way: a slow or absent controller costs nothing but age.

    A report that says nothing new is sent only once a second, as a sign of life.
    """

    def __init__(self) -> None:
        self._newest: DeviceReport | None = None
        self._repeat_at_s = 0.0
        self._offered = asyncio.Event()
        self._controller: ActorHandle[Any] | None = None

    def offer(self, report: DeviceReport, now_s: float) -> None:
        """Replace the report that waits to be sent. Never blocks. now_s: monotonic."""
        if self._newest is None or now_s >= self._repeat_at_s or not report.same_numbers(self._newest):
            self._newest = report
            self._repeat_at_s = now_s + _REPEAT_S
            self._offered.set()

    async def run(self) -> None:
        """Send for ever what is offered. Runs as one task."""
        while True:
            await self._offered.wait()
            if self._controller is None and not await self._find():
                await asyncio.sleep(_RETRY_S)
                continue
            self._offered.clear()
            await self._send()

    async def _send(self) -> None:
        assert self._controller is not None
        try:
            await self._controller.report_device.remote(self._newest)
        except RayError as error:
            # Whatever happened to the controller or to the call, the next report is as good: look the actor up anew.
            logger.warning("report not delivered: %s", str(error).splitlines()[0])
            self._controller = None
            self._offered.set()
            await asyncio.sleep(_RETRY_S)

    async def _find(self) -> bool:
        try:
            # Blocks on the cluster's control store, which may itself be away.
            self._controller = await asyncio.to_thread(ray.get_actor, CONTROLLER_NAME, NAMESPACE)
        except (ValueError, RayError):
            return False
        logger.info("reporting to %s", CONTROLLER_NAME)
        return True
