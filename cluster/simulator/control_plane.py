"""The simulated controller: reports in, views, targets and replica counts out, by the live cluster's code."""

import math
from collections.abc import Sequence

from cluster.cluster_view import ClusterView
from cluster.move_planner import MoveOrder
from cluster.prediction import Predictor
from cluster.scaling import Demand, ScalingSettings, ScalingState, decide_scale
from cluster.simulator.scenario import Scenario
from cluster.simulator.sim_replica import SimReplica
from cluster.simulator.sim_router import SimRouter
from cluster.target_planner import TargetSettings
from replicas.engine_pace import ENOUGH_STEPS
from replicas.step_time import StepTime, StepTimeModel

_LEARNERS = 8
"""Engines whose steps teach the step-time model, at each report."""
_UNKNOWN = StepTime(0.0)
"""What engines report of their steps until they have seen some."""
PLAN_EVERY_S = 5.0
"""Seconds from one decision on the number of replicas to the next; targets are planned as reports come."""


class ControlPlane:
    """What the agents' reports lead to.

    Attributes:
        rounds: of reports.
        wanted: replicas that there should be.
        moves: requests that are to move, as of the last planning round.
    """

    def __init__(self, scenario: Scenario, replicas: Sequence[SimReplica], routers: Sequence[SimRouter]) -> None:
        profile = scenario.profile
        self.rounds = 0
        self.wanted = scenario.replicas
        self.moves: Sequence[MoveOrder] = ()
        self._moves_number = 0
        self._scenario, self._replicas, self._routers = scenario, replicas, routers
        self._tightest_s = min(one.tpot_ms for one in scenario.classes) / 1000
        settings = TargetSettings(
            batch_sizing=scenario.batch_sizing, tpot_s=self._tightest_s, migration=scenario.migration
        )
        self._view = ClusterView(settings, epoch_ms=0)
        # What is assumed first is wrong on purpose: it is learned from the steps that the engines report.
        known = profile.step_time
        self._steps = StepTimeModel(StepTime(2 * known.step_s, token_s=2 * known.token_s))
        self._scaling = ScalingState()
        self._scaled = ScalingSettings(
            least=1,
            most=max(scenario.replicas_most, scenario.replicas),
            tpot_target_s=self._tightest_s,
            kv_tokens=profile.kv_tokens,
            start_s=scenario.start_s,
        )
        self._prompt_tokens = self._requests = 0
        self._scaled_s = 0.0
        for row in range(scenario.replicas, len(replicas)):
            replicas[row].up = False
            self._close(row, True)

    @property
    def predictor(self) -> Predictor:
        """By what is known of the engines' steps now."""
        profile = self._scenario.profile
        return Predictor(
            self._steps.step_time, profile.max_num_batched_tokens, profile.max_num_seqs, profile.overhead_s
        )

    def arrived(self, prompt_tokens: int) -> None:
        """A request has come."""
        self._prompt_tokens += prompt_tokens
        self._requests += 1

    def report(self, now_s: float) -> None:
        """Every agent that can reports, and replicas fetch what was planned from it. Some engines' steps, in turn,
        teach the step-time model that all report."""
        known = self._steps.step_time if self._steps.observed >= ENOUGH_STEPS else _UNKNOWN
        for replica in self._replicas:
            if replica.reporting and replica.reachable:
                self._view.receive(replica.report(now_s, known), now_s)
                if (target := self._view.targets.target_for(replica.name)) is not None:
                    replica.apply(target)
        count = len(self._replicas)
        first = self.rounds * _LEARNERS % count
        self.rounds += 1
        for at in range(first, first + min(_LEARNERS, count)):
            replica = self._replicas[at % count]
            step = replica.engine.last_step() if replica.up and replica.reporting else None
            if step is not None:
                self._steps.observe(*step)

    def plan(self, now_s: float, door_tokens: int) -> list[int]:
        """A planning round: the routers' view, and how many replicas. ``door_tokens`` wait in front of all.
        Returns
        the rows of replicas that are to be started."""
        view = self._view.pressure_view(now_s)
        for router in self._routers:
            router.fleet.take(view.engines, now_s)
        self.moves = [order for order in view.moves if order.number > self._moves_number]
        self._moves_number = max((order.number for order in self.moves), default=self._moves_number)
        if self._scenario.scaling and now_s - self._scaled_s >= PLAN_EVERY_S:
            starting = self._scale(now_s, now_s - self._scaled_s, door_tokens)
            self._scaled_s = now_s
            return starting
        return []

    def started(self, row: int, now_s: float) -> None:
        """A replica is ready."""
        if not self._replicas[row].lent:
            return
        self._replicas[row].restart()
        self._close(row, False)

    def _scale(self, now_s: float, seconds: float, door_tokens: int) -> list[int]:
        """Close replicas that are too many; rows of those to be started."""
        step_time, traffic = self._steps.step_time, self._routers[0].traffic
        fleets = [router.fleet for router in self._routers]
        pending = sum(float(fleet.pending_tokens.sum()) for fleet in fleets) + door_tokens
        demand = Demand(
            prompt_rate=self._prompt_tokens / seconds,
            output_rate=self._requests * traffic.output_tokens / seconds,
            context_tokens=traffic.prompt_tokens,
            kv_tokens=float(fleets[0].kv_used.sum()) + pending,
            waiting_s=pending * step_time.token_s,
        )
        self._prompt_tokens = self._requests = 0
        self._scaling, decision = decide_scale(self._scaling, demand, self.wanted, step_time, self._scaled, now_s)
        self.wanted = decision.replicas
        open_ = [row for row, replica in enumerate(self._replicas) if replica.lent]
        for row in open_[self.wanted :]:
            self._replicas[row].lent = False
            self._close(row, True)
        for replica in self._replicas:  # those that have drained stop
            if not replica.lent and replica.up and replica.engine.next_event_s == math.inf:
                replica.up = False
        starting = [row for row, replica in enumerate(self._replicas) if not replica.lent and not replica.up]
        starting = starting[: max(0, self.wanted - len(open_))]
        for row in starting:
            self._replicas[row].lent = True
        return starting

    def _close(self, row: int, closed: bool) -> None:
        self._replicas[row].lent = not closed
        for router in self._routers:
            router.fleet.closed[row] = closed
