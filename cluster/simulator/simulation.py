"""The event loop: requests come, engines end runs of steps, agents report, the controller plans, things break.

    arrivals (in order) ---\\
                            >--- next in time ---> router -> engine model -> outcome
    heap of (time, number) /          |
                                      +--> reports -> ClusterView -> pressure view -> routers

Events of one moment run in the order in which they were made, and chance comes from the seed alone, so a run repeats
bit for bit.
"""

import heapq
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from cluster.admission import AdmissionQueue, Ticket, Verdict
from cluster.bench.report import Slo
from cluster.bench.traces import BLOCK_TOKENS
from cluster.config import SloClass
from cluster.move import MoveOutcome
from cluster.move_planner import Candidate, MoveOrder, pick
from cluster.prediction import PredictionError, Predictor
from cluster.routing_policy import LEFT_OUT, SATURATED, Ranking, RouteRequest
from cluster.simulator.arrivals import Arrival
from cluster.simulator.control_plane import PLAN_EVERY_S, ControlPlane
from cluster.simulator.fault_player import FaultPlayer
from cluster.simulator.faults import check_faults
from cluster.simulator.memory_sample import sample_memory
from cluster.simulator.result import SimulationResult
from cluster.simulator.scenario import Progress, Scenario
from cluster.simulator.sim_replica import SimReplica
from cluster.simulator.sim_router import SimRouter
from cluster.slo import Ending, Outcome, SloAccount, class_targets
from replicas.decode_batch import EngineRequest
from replicas.elastic_prefill import Objectives

_NO_REPLICA = -1
_ROOM_SHARE = 0.25
"""Of the tightest TTFT target that a request may wait in an engine: longer it waits at the door."""


@dataclass(eq=False, slots=True)
class _Request:
    """One request on its way.

    Attributes:
        row: the replica that has it; negative while none does.
        charged: tokens of its prompt that its router takes to be computed there.
        predicted: TTFT and TPOT when it was sent.
    """

    arrival: Arrival
    number: int
    slo: Slo
    router: SimRouter
    route: RouteRequest
    row: int = _NO_REPLICA
    tries: int = 0
    charged: int = 0
    predicted: tuple[float, float] | None = None
    engine: EngineRequest | None = None
    sent_s: float = 0.0
    first_s: float = math.nan
    ended: bool = False


@dataclass(eq=False, slots=True)
class _Move:
    """A request on its way to the replica ``to``. is_copied: all but the newest of its KV is there."""

    request: _Request
    to: int
    order: MoveOrder
    is_copied: bool = False


class Simulation:
    """One run. Raises BenchError for what does not fit together.

    Args:
        prefix_tokens: of the arrivals' prefix blocks.
    """

    def __init__(self, scenario: Scenario, arrivals: Sequence[Arrival], prefix_tokens: int = BLOCK_TOKENS) -> None:
        check_faults(scenario.faults, scenario.replicas, scenario.nodes)
        profile = scenario.profile
        rng = random.Random(scenario.seed)
        self._scenario, self._arrivals = scenario, arrivals
        self._classes = {one.name: one for one in scenario.classes}
        self._slos = {one.name: class_targets(one) for one in scenario.classes}
        self.replicas = [
            SimReplica(f"replica-{n:05d}", f"node-{n // scenario.per_node:05d}", profile, prefix_tokens)
            for n in range(max(scenario.replicas, scenario.replicas_most))
        ]
        names = [replica.name for replica in self.replicas]
        self._routers = [
            SimRouter(scenario.policy, names, self._predictor, prefix_tokens, profile.kv_tokens, scenario.routers, rng)
            for _ in range(scenario.routers)
        ]
        self._control = ControlPlane(scenario, self.replicas, self._routers)
        self._door = AdmissionQueue(scenario.classes)
        self._waiting: dict[int, _Request] = {}
        classes = scenario.classes
        self._tightest_s = min(c.ttft_ms for c in classes) / 1000, min(c.tpot_ms for c in classes) / 1000
        self._rows = {name: row for row, name in enumerate(names)}
        self._moving: dict[int, _Move] = {}
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = itertools.count()
        self._owners: dict[int, _Request] = {}
        self._held_back: list[tuple[int, Sequence[EngineRequest], Sequence[EngineRequest]]] = []
        self._open = len(arrivals)
        self._account = SloAccount()
        self._ttft_error, self._tpot_error = PredictionError(), PredictionError()
        self._result = SimulationResult(scenario, self._account, self._ttft_error, self._tpot_error)

    def run(self, progress: Progress | None = None) -> SimulationResult:
        """Until the last request has ended."""
        scenario, events, arrivals = self._scenario, self._events, self._arrivals
        player = FaultPlayer(self.replicas, scenario.per_node, self._die, self._heal)
        for fault in scenario.faults:
            self._at(fault.at_s, partial(player.begin, fault))
            self._at(fault.at_s + fault.lasts_s, partial(player.end, fault))
        self._report(0.0)
        self._sample(0.0)
        total, coming, now_s = len(arrivals), 0, 0.0
        while self._open:
            if coming < total and (not events or arrivals[coming].at_s <= events[0][0]):
                now_s = arrivals[coming].at_s
                self._arrive(arrivals[coming], coming, now_s)
                coming += 1
                if progress is not None and coming % 1000 == 0:
                    progress(total - self._open, total)
            else:
                now_s, _number, run = heapq.heappop(events)
                run(now_s)
        self._result.duration_s = now_s
        self._result.reports = self._control.rounds
        self._result.preemptions = sum(replica.engine.preemptions for replica in self.replicas)
        if progress is not None:
            progress(total, total)
        return self._result

    def time_planning(self, rounds: int, clock: Callable[[], float]) -> list[float]:
        """Seconds, by ``clock``, of planning rounds in the present state: view, targets and scaling."""
        now_s, taken = self._result.duration_s, []
        for _ in range(rounds):
            now_s += PLAN_EVERY_S
            self._control.report(now_s)
            began_s = clock()
            self._control.plan(now_s, self._door.tokens)
            taken.append(clock() - began_s)
        return taken

    def _at(self, at_s: float, run: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._numbers), run))

    def _predictor(self) -> Predictor:
        return self._control.predictor

    # requests

    def _arrive(self, arrival: Arrival, number: int, now_s: float) -> None:
        slo_class = self._class_of(arrival)
        slo = self._slos[slo_class.name]
        request = _Request(
            arrival,
            number,
            slo,
            self._routers[number % len(self._routers)],
            RouteRequest(arrival.prompt_tokens, arrival.prefix, slo),
        )
        if slo_class.deadline_ms is not None:
            self._at(now_s + slo_class.deadline_ms / 1000, partial(self._time_out, request))
        self._control.arrived(arrival.prompt_tokens)
        if self._scenario.admission:
            self._offer(request, now_s)
        else:
            self._route(request, now_s)

    def _offer(self, request: _Request, now_s: float) -> None:
        """The request is at the door."""
        arrival = request.arrival
        step, traffic = self._control.predictor.step_time, request.router.traffic
        ticket = Ticket(
            number=request.number,
            slo_class=self._class_of(arrival).name,
            tenant=arrival.tenant,
            tokens=arrival.prompt_tokens + round(traffic.output_tokens),
            arrived_s=now_s,
            due_s=now_s + (request.slo.ttft_ms or math.inf) / 1000,
            compute_s=step.prompt_s(arrival.prompt_tokens, self._scenario.profile.max_num_batched_tokens),
        )
        ranking = request.router.rank(request.route, now_s)
        decision = self._door.offer(ticket, now_s, self._has_room(request, ranking))
        if decision.verdict is Verdict.ADMITTED:
            self._send(request, ranking, now_s)
        elif decision.verdict is Verdict.QUEUED:
            self._waiting[request.number] = request
        else:
            self._end(request, Ending.REJECTED, now_s)

    def _has_room(self, request: _Request, ranking: Ranking) -> bool:
        """Whether the best replica would begin it about now, and the tightest class's TPOT be kept there: what is in an
        engine is served in its order, so one request too many of a patient class delays those of all."""
        row = ranking.best
        if ranking.scores[row] >= SATURATED:
            return False
        fleet = request.router.fleet
        seconds = ranking.predicted or self._control.predictor.predict(
            fleet, request.arrival.prompt_tokens, np.zeros(len(fleet)), request.router.traffic
        )
        waits_s = seconds.ttft_s[row] - seconds.own_s[row] - self._scenario.profile.overhead_s
        ttft_s, tpot_s = self._tightest_s
        return bool(waits_s <= _ROOM_SHARE * ttft_s and (seconds.tpot_s[row] <= tpot_s or fleet.requests[row] < 1))

    def _enter(self, now_s: float) -> None:
        """Let those in that wait at the door, as long as there is room; those that cannot make it go."""
        if not self._door.requests:
            return
        for late in self._door.drop_late(now_s):
            self._end(self._waiting.pop(late.number), Ending.REJECTED, now_s)
        while (ticket := self._door.peek()) is not None:
            request = self._waiting.get(ticket.number)
            if request is None or request.ended:  # timed out at the door
                self._door.take(now_s)
                self._waiting.pop(ticket.number, None)
                continue
            ranking = request.router.rank(request.route, now_s)
            if not self._has_room(request, ranking):
                return
            self._door.take(now_s)
            del self._waiting[ticket.number]
            self._send(request, ranking, now_s)

    def _class_of(self, arrival: Arrival) -> SloClass:
        return self._classes[arrival.slo_class] if arrival.slo_class else self._scenario.classes[0]

    def _route(self, request: _Request, now_s: float) -> None:
        if not request.ended:
            self._send(request, request.router.rank(request.route, now_s), now_s)

    def _send(self, request: _Request, ranking: Ranking, now_s: float) -> None:
        row = ranking.best
        request.tries += 1
        request.row = row
        if ranking.predicted is not None and request.tries == 1 and ranking.scores[row] < LEFT_OUT:
            request.predicted = float(ranking.predicted.ttft_s[row]), float(ranking.predicted.tpot_s[row])
        request.charged = request.router.send(request.route, ranking, row, now_s)
        replica = self.replicas[row]
        if not replica.reachable:
            self._at(now_s + self._scenario.timeout_s, partial(self._unanswered, request))
        elif not replica.up:
            self._lose(request, now_s)
        else:
            self._submit(request, row, now_s)

    def _submit(self, request: _Request, row: int, now_s: float) -> None:
        arrival = request.arrival
        request.engine = EngineRequest(request.number, arrival.prompt_tokens, arrival.output_tokens, arrival.prefix)
        request.sent_s = now_s
        self._owners[request.number] = request
        self.replicas[row].submit(request.engine, self._objectives(request), now_s)
        self._follow(row)

    @staticmethod
    def _objectives(request: _Request) -> Objectives:
        slo = request.slo
        return Objectives((slo.ttft_ms or math.inf) / 1000, (slo.tpot_ms or math.inf) / 1000)

    def _follow(self, row: int) -> None:
        """Be there when the engine's run of steps ends, unless it has been ended before."""
        engine = self.replicas[row].engine
        at_s = engine.next_event_s
        if at_s < math.inf:
            self._at(at_s, partial(self._advance, row))

    def _advance(self, row: int, now_s: float) -> None:
        replica = self.replicas[row]
        if replica.engine.next_event_s != now_s or not replica.up:
            return
        progress = replica.advance()
        if progress.started or progress.finished:
            if replica.reachable:
                self._tell(row, progress.started, progress.finished, now_s)
            else:
                self._held_back.append((row, progress.started, progress.finished))
        if row in self._moving and self._moving[row].is_copied:
            self._switch(row, now_s)
        self._follow(row)

    def _tell(
        self, row: int, started: Sequence[EngineRequest], finished: Sequence[EngineRequest], now_s: float
    ) -> None:
        """Tokens have come from a replica."""
        for one in started:
            request = self._owners.get(one.request_id)
            if request is not None and request.engine is one:
                request.first_s = now_s + self._scenario.profile.overhead_s
                request.router.fleet.first_token(row, request.charged)
        for one in finished:
            request = self._owners.get(one.request_id)
            if request is not None and request.engine is one:
                request.router.fleet.ended(row)
                request.router.traffic.answered(one.output_tokens)
                self._end(request, Ending.ANSWERED, now_s)
        self._enter(now_s)

    def _unanswered(self, request: _Request, now_s: float) -> None:
        """A replica that could not be reached when a request was sent to it has not answered in time."""
        if not request.ended:
            self._lose(request, now_s)

    def _lose(self, request: _Request, now_s: float) -> None:
        """Its replica has died or does not answer: another one, as long as there is no token and a try left."""
        request.router.fleet.failed(request.row, now_s)
        request.router.fleet.ended(request.row, request.charged if math.isnan(request.first_s) else 0)
        if math.isnan(request.first_s) and request.tries <= self._scenario.retries:
            self._owners.pop(request.number, None)
            request.row = _NO_REPLICA
            self._at(now_s, partial(self._route, request))
        else:
            self._end(request, Ending.FAILED, now_s)

    def _time_out(self, request: _Request, now_s: float) -> None:
        if request.ended:
            return
        if request.row != _NO_REPLICA:
            waits = math.isnan(request.first_s)
            request.router.fleet.ended(request.row, request.charged if waits else 0)
            if request.engine is not None:
                self.replicas[request.row].cancel(request.engine)
        self._end(request, Ending.TIMED_OUT, now_s)

    def _end(self, request: _Request, ending: Ending, now_s: float) -> None:
        request.ended = True
        self._owners.pop(request.number, None)
        self._open -= 1
        arrival = request.arrival
        overhead_s = self._scenario.profile.overhead_s
        ttft_s = request.first_s - arrival.at_s
        after_first_s = now_s + overhead_s - request.first_s
        tpot_s = after_first_s / (arrival.output_tokens - 1) if arrival.output_tokens > 1 else 0.0
        outcome = Outcome(
            slo_class=self._class_of(arrival).name,
            model=self._scenario.profile.name,
            replica="" if request.row == _NO_REPLICA else self.replicas[request.row].name,
            slo=request.slo,
            ending=ending,
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            latency_s=now_s + overhead_s - arrival.at_s,
            output_tokens=arrival.output_tokens if ending is Ending.ANSWERED else 0,
        )
        self._result.add(request.number, arrival, outcome, request.engine)
        if ending is Ending.ANSWERED and request.predicted is not None:
            waited_s = request.sent_s - arrival.at_s
            self._ttft_error.observe(request.predicted[0], ttft_s - waited_s)
            self._tpot_error.observe(request.predicted[1], tpot_s)

    # migration

    def _move(self, order: MoveOrder, now_s: float) -> None:
        """Have a request of the order's source go: at once where it has no token, else when its KV has been copied."""
        row, to = self._rows[order.source], self._rows[order.destination]
        if row in self._moving or not self._can_move(row, to):
            return
        there = {str(one.request_id): one for one in self.replicas[row].engine.requests}
        chosen = pick(order, [Candidate(name, one.known_tokens, one.generated > 0) for name, one in there.items()])
        if chosen is None:
            return
        engine = there[chosen.request_id]
        request = self._owners[engine.request_id]
        if chosen.answered:
            move = self._moving[row] = _Move(request, to, order)
            profile = self._scenario.profile
            seconds = chosen.tokens * profile.kv_token_bytes / profile.host.bytes_per_s
            self._at(now_s + seconds, partial(self._copied, row, move))
            return
        self._result.moves[order.trigger, MoveOutcome.REROUTED] += 1
        self.replicas[row].cancel(engine)
        fleet = request.router.fleet
        fleet.ended(row, request.charged)
        fleet.sent(to, request.charged)
        request.row = to
        self._submit(request, to, now_s)

    def _can_move(self, row: int, to: int) -> bool:
        return all(one.up and one.reachable for one in (self.replicas[row], self.replicas[to]))

    def _copied(self, row: int, move: "_Move", now_s: float) -> None:
        """What it lacks at the destination is the last step's: it goes when the step under way has ended."""
        if self._moving.get(row) is not move:
            return
        move.is_copied = True
        self.replicas[row].engine.end_step(now_s)
        self._follow(row)
        if self.replicas[row].engine.next_event_s == math.inf:
            self._switch(row, now_s)

    def _switch(self, row: int, now_s: float) -> None:
        move = self._moving.pop(row)
        request, to, engine = move.request, move.to, move.request.engine
        assert engine is not None
        here = not request.ended and request.row == row and self._owners.get(request.number) is request
        moved = here and self._can_move(row, to) and self.replicas[row].let_go(engine)
        self._result.moves[move.order.trigger, MoveOutcome.MOVED if moved else MoveOutcome.FAILED] += 1
        if not moved:
            return
        request.row = to
        fleet = request.router.fleet
        fleet.ended(row)
        fleet.sent(to, 0)
        request.engine = self.replicas[to].take_in(engine, self._objectives(request), now_s)
        self._follow(to)

    # control

    def _report(self, now_s: float) -> None:
        """Agents report, the controller plans, and routers get its view."""
        self._control.report(now_s)
        for row in self._control.plan(now_s, self._door.tokens):
            self._at(now_s + self._scenario.start_s, partial(self._control.started, row))
        for order in self._control.moves:
            self._move(order, now_s)
        self._enter(now_s)
        self._at(now_s + self._scenario.report_every_s, self._report)

    def _sample(self, now_s: float) -> None:
        self._result.samples.append(sample_memory(self.replicas, self._scenario.profile, now_s))
        self._at(now_s + self._scenario.sample_every_s, self._sample)

    # faults

    def _heal(self, now_s: float) -> None:
        """What nodes that can be reached again have held back arrives."""
        held_back, self._held_back = self._held_back, []
        for row, started, finished in held_back:
            if self.replicas[row].reachable:
                self._tell(row, started, finished, now_s)
            else:
                self._held_back.append((row, started, finished))

    def _die(self, row: int, now_s: float) -> None:
        replica = self.replicas[row]
        if (move := self._moving.pop(row, None)) is not None:
            self._result.moves[move.order.trigger, MoveOutcome.FAILED] += 1
        lost = replica.drain()
        for router in self._routers:
            router.policy.lost(row)
        for one in lost:
            request = self._owners.get(one.request_id)
            if request is not None and request.engine is one:
                self._lose(request, now_s)
