"""What the controller knows and wants: reports in, targets and views out. Pure: time is an argument.

Everything here is soft state. It is built from the agents' reports and from nothing else, so a controller that starts
anew has it back one report of each device later. A report older than STALE_AFTER_S reads as absent.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from operator import attrgetter
from typing import Any

from cluster.decision import Decision, DecisionLog
from cluster.move_planner import MoveOrder, MovePlanner, PlannedMove
from cluster.target_planner import TargetPlanner, TargetSettings, step_time_of
from memory_agent.reports import DeviceReport, EngineReport, PressureLevel
from replicas.step_time import StepTime

STALE_AFTER_S = 3.0
FORGET_AFTER_S = 60.0
"""A device without reports is listed as absent this long."""
_FORGET_EVERY_S = 1.0
_RATIO_CEILING = 99.0

logger = logging.getLogger(__name__)


def _numbers_of(report: type[DeviceReport] | type[EngineReport]) -> Callable[[Any], tuple[float, ...]]:
    return attrgetter(*(field.name for field in fields(report) if field.type in (int, float)))


_DEVICE_NUMBERS, _ENGINE_NUMBERS = _numbers_of(DeviceReport), _numbers_of(EngineReport)


class ReportOutcome(StrEnum):
    """Answer to a report."""

    APPLIED = "applied"
    STALE = "stale"
    """Not newer than one that is known: ignored."""
    INVALID = "invalid"
    """A number in it is negative or not finite: refused, so that one broken agent cannot mislead the plan."""


@dataclass(frozen=True)
class EnginePressure:
    """What routing needs to know of an engine.

    Attributes:
        kv_usage: used share of the capacity inside the lease, 0 to 1; demand_ratio: demanded bytes over the limit.
        age_s: age of the report when this view was made.
        kv_tokens: tokens that fit inside the lease; kv_share_tokens: that fit into what the engine gets when it asks,
            while others have it on loan, 0 where it shares its budget with none; kv_used_tokens: of the requests that
            run.
        max_num_seqs: requests that it is to get at once: within its own settings and its target, fewer where it is late
            and another one has room; max_num_batched_tokens: its own setting. 0 before it has told them.
        step_time: of its steps, as the engine has learned it; None until then.
        prompt_tokens: of a prompt, mean of the recent ones, 0 before the first.
    """

    level: PressureLevel
    kv_usage: float
    demand_ratio: float
    running: int
    waiting: int
    age_s: float
    kv_tokens: int = 0
    kv_share_tokens: int = 0
    kv_used_tokens: int = 0
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    step_time: StepTime | None = None
    prompt_tokens: float = 0.0


_WITHOUT_AGE: Callable[[EnginePressure], tuple[Any, ...]] = attrgetter(
    *(field.name for field in fields(EnginePressure) if field.name != "age_s")
)


@dataclass(frozen=True)
class PressureView:
    """Every engine with a fresh report.

    Attributes:
        revision: grows with each change, also across restarts of the controller.
        moves: requests that are to move now.
    """

    revision: int
    engines: dict[str, EnginePressure]
    moves: tuple[MoveOrder, ...] = ()


@dataclass(frozen=True)
class ControllerMeasures:
    """For metrics. Crosses processes.

    Attributes:
        reports: the fresh ones; ages_s: of the newest report by (node, device), stale ones too.
        outcomes: reports by outcome; decisions: by kind. started_s: Unix time at which this life began.
    """

    reports: tuple[DeviceReport, ...]
    ages_s: dict[tuple[str, str], float]
    outcomes: dict[str, int]
    decisions: dict[str, int]
    started_s: float


@dataclass(frozen=True)
class _Received:
    report: DeviceReport
    at_s: float


class ClusterView:
    """State of the controller. ``now_s`` is monotonic seconds of one clock; epoch_ms: wall clock at its start.

    Attributes:
        targets: of all engines; moves: between them; decisions: about both, and what else the controller is told of.
    """

    def __init__(self, settings: TargetSettings, epoch_ms: int) -> None:
        self.targets = TargetPlanner(settings, epoch_ms)
        self.moves = MovePlanner(epoch_ms)
        self.decisions = DecisionLog()
        self._epoch_ms = epoch_ms
        self._devices: dict[tuple[str, str], _Received] = {}
        self._outcomes = dict.fromkeys(ReportOutcome, 0)
        # A wall clock as the first revision: no view of a former life can be mistaken for one of this life.
        self._revision = epoch_ms
        self._shown: tuple[dict[str, tuple[Any, ...]], tuple[MoveOrder, ...]] = {}, ()
        self._forget_at_s = -math.inf

    def receive(self, report: DeviceReport, now_s: float) -> ReportOutcome:
        """Take in a report and plan for its engines. Reports of a device count in order of (agent life, sequence)."""
        outcome = self._judge(report, now_s)
        self._outcomes[outcome] += 1
        if outcome is ReportOutcome.APPLIED:
            before = self._devices.get((report.node, report.device))
            self._devices[report.node, report.device] = _Received(report, now_s)
            if before is not None:
                self._drop_targets(before.report, {engine.engine_id for engine in report.engines})
            if now_s >= self._forget_at_s:
                self._forget(now_s)
            for engine in report.engines:
                if (decision := self.targets.plan(engine, now_s)) is not None:
                    self.decide(decision, now_s)
            if self.targets.settings.migration and self.moves.is_due(now_s):
                self._plan_moves(now_s)
        return outcome

    def decide(self, decision: Decision, now_s: float) -> None:
        """Keep a decision, and log it."""
        self.decisions.add(decision, now_s)
        logger.info("%s", decision.line)

    def pressure_view(self, now_s: float) -> PressureView:
        """The engines with fresh reports. The revision grows when the numbers differ from those of the view before."""
        engines = {
            engine.engine_id: EnginePressure(
                level=engine.pressure,
                kv_usage=round(engine.kv_usage, 3),
                demand_ratio=round(min(engine.demand_bytes / max(engine.limit_bytes, 1), _RATIO_CEILING), 3),
                running=engine.running,
                waiting=engine.waiting,
                age_s=now_s - received.at_s,
                kv_tokens=engine.reachable_blocks * engine.block_tokens,
                kv_share_tokens=_share_blocks(received.report, engine) * engine.block_tokens,
                kv_used_tokens=engine.kv_tokens,
                max_num_seqs=self.targets.requests_for(engine),
                max_num_batched_tokens=engine.max_num_batched_tokens,
                step_time=step_time_of(engine),
                prompt_tokens=engine.prompt_tokens,
            )
            for received in self._fresh(now_s)
            for engine in received.report.engines
        }
        shown = {name: _WITHOUT_AGE(one) for name, one in engines.items()}, self.moves.orders
        if shown != self._shown:
            self._shown = shown
            self._revision += 1
        return PressureView(self._revision, engines, self.moves.orders)

    def measures(self, now_s: float) -> ControllerMeasures:
        """What metrics tell of it."""
        return ControllerMeasures(
            reports=tuple(received.report for received in self._fresh(now_s)),
            ages_s={name: now_s - received.at_s for name, received in sorted(self._devices.items())},
            outcomes={str(outcome): count for outcome, count in self._outcomes.items()},
            decisions=dict(self.decisions.counts),
            started_s=self._epoch_ms / 1000,
        )

    def snapshot(self, now_s: float) -> dict[str, Any]:
        """Everything known, JSON-ready. Sizes are bytes; ``memory`` is ``DeviceReport.bytes_by_owner``."""
        nodes: dict[str, list[dict[str, Any]]] = {}
        for received in self._fresh(now_s):
            nodes.setdefault(received.report.node, []).append(self._device_json(received, now_s))
        absent = [
            {"node": node, "device": device, "report_age_s": round(now_s - received.at_s, 3)}
            for (node, device), received in sorted(self._devices.items())
            if now_s - received.at_s > STALE_AFTER_S
        ]
        return {
            "nodes": [{"node": node, "devices": devices} for node, devices in nodes.items()],
            "absent_devices": absent,
            "reports": {str(outcome): count for outcome, count in self._outcomes.items()},
            "bounds": {
                "token_budget_max": self.targets.settings.token_budget_max,
                "active_max": self.targets.settings.active_max,
            },
        }

    def _plan_moves(self, now_s: float) -> None:
        before = {(order.source, order.destination, order.trigger) for order in self.moves.orders}
        engines = (
            (engine, _share_blocks(received.report, engine) * engine.block_tokens)
            for received in self._fresh(now_s)
            for engine in received.report.engines
        )
        for move in self.moves.plan(engines, now_s):
            order = move.order
            if (order.source, order.destination, order.trigger) not in before:
                self.decide(_decision_of(move), now_s)

    def _judge(self, report: DeviceReport, now_s: float) -> ReportOutcome:
        if not all(math.isfinite(number) and number >= 0 for number in _numbers(report)):
            return ReportOutcome.INVALID
        known = self._devices.get((report.node, report.device))
        # An order older than STALE_AFTER_S binds nobody: the clock of a node may have been set back between two lives.
        fresh = known is not None and now_s - known.at_s <= STALE_AFTER_S
        if known is not None and fresh and _order(report) <= _order(known.report):
            return ReportOutcome.STALE
        return ReportOutcome.APPLIED

    def _forget(self, now_s: float) -> None:
        """Drop devices long gone, and their engines' targets. It looks at all devices, so not with every report."""
        self._forget_at_s = now_s + _FORGET_EVERY_S
        for key, received in list(self._devices.items()):
            if now_s - received.at_s > FORGET_AFTER_S:
                del self._devices[key]
                self._drop_targets(received.report, set())

    def _drop_targets(self, report: DeviceReport, kept: set[str]) -> None:
        """Drop the targets of a device's former engines; an engine stays on its device."""
        for engine in report.engines:
            if engine.engine_id not in kept:
                self.targets.forget(engine)

    def _fresh(self, now_s: float) -> Iterator[_Received]:
        for _, received in sorted(self._devices.items()):
            if now_s - received.at_s <= STALE_AFTER_S:
                yield received

    def _device_json(self, received: _Received, now_s: float) -> dict[str, Any]:
        report = received.report
        replicas: list[dict[str, Any]] = list(report.to_json()["engines"])
        for replica in replicas:
            target = self.targets.target_for(replica["engine_id"])
            replica["target"] = asdict(target) if target is not None else None
        return {
            "device": report.device,
            "agent_pid": report.agent_pid,
            "pressure": report.pressure.name,
            "report_age_s": round(now_s - received.at_s, 3),
            "budget_bytes": report.budget_bytes,
            "dead_engines": report.dead_engines,
            "memory": {f"{owner}_bytes": held for owner, held in report.bytes_by_owner.items()},
            "running": sum(engine.running for engine in report.engines),
            "waiting": sum(engine.waiting for engine in report.engines),
            "replicas": replicas,
        }


def _decision_of(move: PlannedMove) -> Decision:
    order = move.order
    seen = {"tokens": order.tokens, "room_tokens": order.room_tokens}
    return Decision("move", order.source, f"a request to {order.destination}, for {order.trigger}", move.reason, seen)


def _share_blocks(report: DeviceReport, engine: EngineReport) -> int:
    """KV blocks that fit into the engine's guarantee, or its equal part of the budget, if that is more and not beyond
    its ceiling; 0 where it is alone with the budget, or nothing fits its lease."""
    if len(report.engines) < 2 or not engine.reachable_blocks:
        return 0
    share_bytes = min(max(engine.guarantee_bytes, report.budget_bytes // len(report.engines)), engine.ceiling_bytes)
    return min(share_bytes * engine.reachable_blocks // max(engine.limit_bytes, 1), engine.blocks_ceiling)


def _order(report: DeviceReport) -> tuple[int, int]:
    return report.agent_epoch_ns, report.sequence


def _numbers(report: DeviceReport) -> Iterator[float]:
    yield from _DEVICE_NUMBERS(report)
    for engine in report.engines:
        yield from _ENGINE_NUMBERS(engine)
