"""The controller: a Ray actor that collects reports, plans, and publishes targets and pressure.

Collect: agents call ``report_device``. Plan: ClusterView, pure. Apply: replicas and routers fetch what is planned, by
revision. It holds no hard state: after a crash Ray starts it again, and the next reports rebuild what it knows. Nothing
waits for it: engines keep their last target, routers what they see themselves.

Two never act at once: Ray gives the name to one actor, and revisions grow from life to life. One that learns from a
report that a later life has given out targets gives out none; it ends where the name is another's.
"""

import asyncio
import logging
import os
import time
import uuid
from typing import Any

import ray
from ray.actor import ActorHandle, exit_actor
from ray.exceptions import RayError

from cluster.cluster_view import ClusterView, ControllerMeasures, PressureView, ReportOutcome
from cluster.decision import Decision
from cluster.target_planner import TargetSettings
from memory_agent.controller_link import CONTROLLER_NAME, NAMESPACE
from memory_agent.durable_actor import ensure_actor
from memory_agent.reports import DeviceReport
from replicas.targets import ReplicaTarget

_WATCH_MAX_S = 30.0
_LOOK_EVERY_S = 0.5
"""A watcher looks this often by itself: a report that turns stale announces itself to nobody."""
_NAME_TIMEOUT_S = 2.0

logger = logging.getLogger(__name__)


def ensure_controller(settings: TargetSettings) -> ActorHandle[Any]:
    """The controller, started where there is none, on this node for preference. A running one keeps its settings. Does
    not wait for the start."""
    node_id = ray.get_runtime_context().get_node_id()
    return ensure_actor(Controller, CONTROLLER_NAME, node_id, settings, soft=True)


class Controller:
    """Actor methods. Calls are run again when the actor died under them: all are idempotent."""

    async def __init__(self, settings: TargetSettings) -> None:  # type: ignore[misc]  # Ray awaits it
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
        self._view = ClusterView(settings, epoch_ms=time.time_ns() // 1_000_000)
        self._received = asyncio.Condition()
        self._life = uuid.uuid4().hex
        logger.info("controller started, its view is rebuilt from the next reports")

    async def report_device(self, report: DeviceReport) -> ReportOutcome:
        """Take in an agent's report. The outcome says what became of it. Ends the actor where its name is another's."""
        outcome = self._view.receive(report, time.monotonic())
        if self._view.targets.superseded:
            await self._settle_who_leads()
        if outcome is ReportOutcome.APPLIED:
            async with self._received:
                self._received.notify_all()
        else:
            logger.warning("%s report %d of %s on %s", outcome, report.sequence, report.device, report.node)
        return outcome

    async def target_for(self, engine_id: str) -> ReplicaTarget | None:
        """The target of an engine, None while no report has named it."""
        return self._view.targets.target_for(engine_id)

    async def record(self, decision: Decision) -> None:
        """Keep what another part of the cluster decided, for ``decisions``."""
        self._view.decide(decision, time.monotonic())

    async def decisions(self, count: int, subject: str = "") -> list[dict[str, Any]]:
        """The last ones, JSON-ready, the newest first; see DecisionLog.last."""
        return self._view.decisions.last(count, subject, time.monotonic())

    async def life(self) -> str:
        """Tells this life of the controller from all others."""
        return self._life

    async def snapshot(self) -> dict[str, Any]:
        """Everything known, JSON-ready; see ClusterView.snapshot."""
        now = {"taken_at_s": time.time(), "controller_pid": os.getpid()}
        return now | self._view.snapshot(time.monotonic())

    async def measures(self) -> ControllerMeasures:
        """Everything that metrics tell of it."""
        return self._view.measures(time.monotonic())

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

    async def _settle_who_leads(self) -> None:
        """A later life of the controller has given out targets, or the clock was set back: whoever has the name
        leads."""
        try:
            named: Any = await asyncio.to_thread(ray.get_actor, CONTROLLER_NAME, NAMESPACE)
            life = await asyncio.wait_for(named.life.remote(), _NAME_TIMEOUT_S)
        except (ValueError, RayError, TimeoutError) as error:
            logger.warning("a later controller has given out targets; this one gives out none (%s)", error)
            return
        if life != self._life:
            logger.warning("another controller has the name: this one ends")
            exit_actor()  # type: ignore[no-untyped-call]
        logger.warning("targets of a later time are at work: the clock was set back; going on above them")
        self._view.targets.lead()

    async def _next_report(self, timeout_s: float) -> None:
        async with self._received:
            try:
                await asyncio.wait_for(self._received.wait(), timeout_s)
            except TimeoutError:
                return
