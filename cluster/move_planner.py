"""Which replicas are to hand a request over, by their load: what routing could not foresee, put right. Pure.

    reports --> short of memory, or late? --> another one that has room --> an order: from, to, about how many tokens
                                                                              |
    an ingress that has requests there --> ``pick``: one that waits goes elsewhere, else one that runs moves with its KV

Answers whose length nobody knew, and prompts that came at once, leave one replica full beside another with room. A
waiting request costs nothing to send elsewhere; one that runs moves where that makes room for those that wait, spares
somebody a preemption, or shortens steps that are too long.

Nothing goes back and forth: a replica that was given a request gives none for a while, and the other way round; what is
on its way counts where it goes; and a destination must be well below the bound that made the source one.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cluster.move import Trigger
from memory_agent.reports import EngineReport, PressureLevel

PLAN_EVERY_S = 0.5
HOLD_S = 2.0
"""Who was given a request gives none so long, and who gave one gets none."""
_AHEAD_S = 2.0
"""Growth of the KV cache that counts: what happens later another plan can see to."""
_ON_ITS_WAY_S = 2.0
"""After an order reports show what has come of it."""
_ROOM_SHARE = 0.95
"""Of a destination's KV memory, that it may fill."""
_LATE_SHARE = 0.25
"""Of its TTFT target, after which a request that waits in an engine is helped."""
_TPOT_SHARE = 0.9
"""Of the TPOT target, that a destination's steps may take; and of the source's steps, to be worth it."""


@dataclass(frozen=True)
class MoveOrder:
    """One request is to leave. Plain data: it crosses processes.

    Attributes:
        number: grows with every order, and from one life of the controller to the next.
        source, destination: engine ids, of one model.
        tokens: KV tokens that the source should be rid of; 0 where any request will do. room_tokens: most that may go.
        queued: requests wait at the source: one of these goes, where one fits.
    """

    number: int
    source: str
    destination: str
    trigger: Trigger
    tokens: int
    room_tokens: int
    queued: bool


@dataclass(frozen=True)
class Candidate:
    """A request at an order's source. tokens: of its prompt and its answer so far; answered: it has a token."""

    request_id: str
    tokens: int
    answered: bool


def pick(order: MoveOrder, candidates: Sequence[Candidate]) -> Candidate | None:
    """The request that goes, of ``candidates`` in the order of their arrival; None where none fits.

    Of those that wait the newest, which has waited least and is least likely to be computed already; of those that run
    the shortest that is enough, else the longest.
    """
    fitting = [one for one in candidates if one.tokens <= order.room_tokens]
    if order.queued and (waiting := [one for one in fitting if not one.answered]):
        return waiting[-1]
    running = [one for one in fitting if one.answered]
    enough = [one for one in running if one.tokens >= order.tokens]
    return min(enough, key=_tokens, default=None) or max(running, key=_tokens, default=None)


def _tokens(candidate: Candidate) -> int:
    return candidate.tokens


@dataclass
class _Load:
    """One engine as a plan sees it; what it is given counts at once.

    Attributes:
        capacity: KV tokens that fit. used: of requests that run; wanted: of those that wait; growth: soon.
        places: requests that it may have beside those that run.
        step_s: of a step that only decodes; NaN where it is not known. row_s, token_s: what a row, and a KV token that
            is read, add to it.
    """

    engine: EngineReport
    capacity: float
    used: float
    wanted: float
    growth: float
    places: int
    step_s: float
    row_s: float
    token_s: float

    @property
    def room(self) -> float:
        """KV tokens that it may be given."""
        return _ROOM_SHARE * self.capacity - self.used - self.wanted - self.growth

    @property
    def mean(self) -> float:
        """KV tokens of a request that runs."""
        return self.used / max(self.engine.running, 1)

    def give(self, tokens: float) -> None:
        self.used += tokens
        self.places -= 1
        self.step_s += self.row_s + tokens * self.token_s


@dataclass(frozen=True)
class _Need:
    """Why a replica is to be rid of a request. urgency: the higher the sooner; see ``MoveOrder`` for the others."""

    load: _Load
    trigger: Trigger
    urgency: float
    tokens: float
    reason: str


@dataclass
class _Memory:
    """What is remembered of an engine, in seconds of the caller's clock. given: when it was sent how many tokens."""

    gave_s: float = -math.inf
    got_s: float = -math.inf
    late_s: float = math.inf
    """Since when it has been late; infinite while it is not."""
    given: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class PlannedMove:
    """An order and, for people, why."""

    order: MoveOrder
    reason: str


class MovePlanner:
    """Belongs to one controller. ``now_s`` is monotonic seconds of one clock; epoch_ms: wall clock at the start of this
    life.

    Attributes:
        orders: those of the last plan.
    """

    def __init__(self, epoch_ms: int) -> None:
        self.orders: tuple[MoveOrder, ...] = ()
        self._number = epoch_ms
        self._planned_s = -math.inf
        self._memory: dict[str, _Memory] = {}

    def is_due(self, now_s: float) -> bool:
        """A plan is to be made."""
        return now_s - self._planned_s >= PLAN_EVERY_S

    def plan(self, engines: Iterable[tuple[EngineReport, int]], now_s: float) -> list[PlannedMove]:
        """Orders in place of those before.

        Args:
            engines: with a fresh report, that may get requests; with the KV tokens that each gets when it asks, 0 where
                that is what it has.
        """
        self._planned_s = now_s
        models: dict[str, list[_Load]] = {}
        for engine, share_tokens in engines:
            if engine.reachable_blocks and engine.max_num_seqs:
                models.setdefault(engine.model, []).append(self._load(engine, share_tokens, now_s))
        known = {load.engine.engine_id for loads in models.values() for load in loads}
        self._memory = {one: memory for one, memory in self._memory.items() if one in known}
        moves = [move for loads in models.values() if len(loads) > 1 for move in self._match(loads, now_s)]
        self.orders = tuple(move.order for move in moves)
        return moves

    def _load(self, engine: EngineReport, share_tokens: int, now_s: float) -> _Load:
        capacity = float(max(engine.reachable_blocks * engine.block_tokens, share_tokens))
        token_bytes = engine.committed_bytes / max(engine.blocks_mapped * engine.block_tokens, 1)
        used = engine.kv_usage * engine.reachable_blocks * engine.block_tokens
        wanted = max(0, engine.demand_bytes - engine.used_bytes) / token_bytes if token_bytes else 0.0
        step_s = engine.step_s + engine.running * engine.row_s + engine.kv_tokens * engine.kv_token_s
        most = min(filter(None, (engine.active_max, engine.max_num_seqs)))
        load = _Load(
            engine,
            capacity,
            used,
            wanted if engine.waiting else 0.0,
            engine.running * _AHEAD_S / step_s if step_s else 0.0,
            most - engine.running - engine.waiting,
            step_s or math.nan,
            engine.row_s,
            engine.kv_token_s,
        )
        memory = self._memory.setdefault(engine.engine_id, _Memory())
        memory.given = [one for one in memory.given if now_s - one[0] < _ON_ITS_WAY_S]
        for _, tokens in memory.given:
            load.give(tokens)
        return load

    def _match(self, loads: Sequence[_Load], now_s: float) -> Iterable[PlannedMove]:
        """Those in need, the most urgent first, with those that have most room, each at most once."""
        needs = [need for load in loads if (need := self._need(load, now_s)) is not None]
        needing = {need.load.engine.engine_id for need in needs}
        free = [load for load in loads if load.engine.engine_id not in needing and self._may_get(load, now_s)]
        for need in sorted(needs, key=lambda need: -need.urgency):
            fitting = [load for load in free if self._fits(need, load)]
            if not fitting:
                continue
            taker = max(fitting, key=lambda load: (load.room / load.capacity, load.engine.engine_id))
            free.remove(taker)
            source, destination = need.load.engine, taker.engine
            self._number += 1
            self._memory[source.engine_id].gave_s = self._memory[destination.engine_id].got_s = now_s
            goes = source.prompt_tokens if source.waiting else need.tokens
            self._memory[destination.engine_id].given.append((now_s, max(goes, need.load.mean)))
            order = MoveOrder(
                self._number,
                source.engine_id,
                destination.engine_id,
                need.trigger,
                math.ceil(need.tokens),
                math.floor(taker.room),
                source.waiting > 0,
            )
            yield PlannedMove(order, need.reason)

    def _need(self, load: _Load, now_s: float) -> _Need | None:
        engine, memory = load.engine, self._memory[load.engine.engine_id]
        lacks = load.used + load.wanted + load.growth - load.capacity
        is_late = engine.waiting > 0 and engine.ttft_share >= _LATE_SHARE
        is_slow = bool(engine.tpot_target_s) and engine.tpot_s > engine.tpot_target_s
        memory.late_s = min(memory.late_s, now_s) if is_late or is_slow else math.inf
        if now_s - memory.got_s < HOLD_S or engine.running + engine.waiting < 2:
            return None
        share = f"{load.used + load.wanted + load.growth:.0f} of {load.capacity:.0f} KV tokens wanted soon"
        if lacks > 0 and load.wanted > 0:
            return _Need(load, Trigger.FRAGMENTATION, 1 + lacks / load.capacity, lacks, f"a prompt waits; {share}")
        if lacks > 0:
            return _Need(load, Trigger.EXHAUSTION, 2 + lacks / load.capacity, lacks, share)
        if now_s - memory.late_s < PLAN_EVERY_S:
            return None
        if is_late:
            return _Need(load, Trigger.SLO, engine.ttft_share, 0.0, f"{engine.ttft_share:.0%} of a TTFT target waited")
        if is_slow:
            ms, target_ms = 1000 * engine.tpot_s, 1000 * engine.tpot_target_s
            return _Need(load, Trigger.SLO, ms / target_ms - 1, 0.0, f"TPOT {ms:.0f} ms of {target_ms:.0f} ms")
        return None

    def _may_get(self, load: _Load, now_s: float) -> bool:
        engine = load.engine
        rests = now_s - self._memory[engine.engine_id].gave_s >= HOLD_S
        return rests and not engine.waiting and load.places > 0 and engine.pressure is PressureLevel.NORMAL

    @staticmethod
    def _fits(need: _Need, taker: _Load) -> bool:
        """The taker has room for a request of the usual size, and its steps stay well below what the source's are."""
        tokens = max(need.load.mean, 1.0)
        if taker.room < tokens:
            return False
        target_s = need.load.engine.tpot_target_s or math.inf
        longer_s = taker.step_s + taker.row_s + tokens * taker.token_s
        if longer_s > _TPOT_SHARE * target_s:  # also False where no step time is known
            return False
        is_slow = need.trigger is Trigger.SLO and not need.load.engine.waiting
        return not is_slow or longer_s < _TPOT_SHARE * need.load.step_s
