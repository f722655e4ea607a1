"""The controller: a Ray actor that collects reports, plans, and publishes targets and pressure.

Collect: agents call ``report_device``. Plan: ClusterView, pure. Apply: replicas and routers fetch what is planned, by
revision. It holds no hard state: after a crash Ray starts it again, and the next reports rebuild what it knows. Nothing
waits for it: engines keep their last target, routers what they see themselves.
"""

import asyncio
import logging
import os
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle

from cluster.cluster_view import ClusterView, PressureView, ReportOutcome, TargetBounds
from memory_agent.controller_link import CONTROLLER_NAME
from memory_agent.durable_actor import ensure_actor
from memory_agent.reports import DeviceReport
from replicas.targets import ReplicaTarget

_WATCH_MAX_S = 30.0
_LOOK_EVERY_S = 0.5
"""A watcher looks this often by itself: a report that turns stale announces itself to nobody."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Bounds:
    """A plain copy of the settings' bounds, so that no configuration class has to cross processes."""

    token_budget_max: int
    active_max: int


def ensure_controller(settings: TargetBounds) -> ActorHandle[Any]:
    """The controller, started where there is none, on this node for preference. A running one keeps its settings. Does
    not wait for the start."""
    node_id = ray.get_runtime_context().get_node_id()
    bounds = _Bounds(settings.token_budget_max, settings.active_max)
    return ensure_actor(Controller, CONTROLLER_NAME, node_id, bounds, soft=True)


class Controller:
    """Actor methods. Calls are run again when the actor died under them: all are idempotent."""

    async def __init__(self, bounds: TargetBounds) -> None:  # type: ignore[misc]  # Ray awaits it
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
        self._view = ClusterView(bounds, epoch_ms=time.time_ns() // 1_000_000)
        self._received = asyncio.Condition()
        logger.info("controller started, its view is rebuilt from the next reports")

    async def report_device(self, report: DeviceReport) -> ReportOutcome:
        """Take in an agent's report. Never raises: the outcome says what became of it."""
        outcome = self._view.receive(report, time.monotonic())
        if outcome is ReportOutcome.APPLIED:
            async with self._received:
                self._received.notify_all()
        else:
            logger.warning("%s report %d of %s on %s", outcome, report.sequence, report.device, report.node)
        return outcome

    async def target_for(self, engine_id: str) -> ReplicaTarget | None:
        """The target of an engine, None while no report has named it."""
        return self._view.target_for(engine_id)

    async def snapshot(self) -> dict[str, Any]:
        """Everything known, JSON-ready; see ClusterView.snapshot."""
        now = {"taken_at_s": time.time(), "controller_pid": os.getpid()}
        return now | self._view.snapshot(time.monotonic())

    async def watch(self, seen_revision: int, timeout_s: float) -> PressureView:
        """The pressure view as soon as its revision is not ``seen_revision``, at the latest after ``timeout_s``, of
        which at most 30 s count. Pass 0 first, then the revision of the last answer."""
        deadline_s = time.monotonic() + min(timeout_s, _WATCH_MAX_S)
        while True:
            view = self._view.pressure_view(time.monotonic())
            left_s = deadline_s - time.monotonic()
            if view.revision != seen_revision or left_s <= 0:
                return view
            await self._next_report(min(left_s, _LOOK_EVERY_S))

    async def _next_report(self, timeout_s: float) -> None:
        async with self._received:
            try:
                await asyncio.wait_for(self._received.wait(), timeout_s)
            except TimeoutError:
                return
