"""One engine on one device, as its board row describes it: what it asked for, claims, holds and is issued."""

import logging
import time
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path

from memory_agent.demand import DemandPeak
from memory_agent.errors import SettingsError
from memory_agent.lease_board import MAX_NAME_BYTES, MAX_WORKERS, AgentWord, EngineWord, Lease, Row, RowState
from memory_agent.lease_planner import LeaseClaim, LeaseDecision
from memory_agent.pressure import Pressure, usage_ratio
from memory_agent.start_lease import Stake

_FOLLOWED = (
    AgentWord.STATE,
    AgentWord.LEASE,
    EngineWord.PID,
    EngineWord.WORKER_COUNT,
    EngineWord.APPLIED_REVISION,
    EngineWord.COMMITTED_BYTES,
    EngineWord.USED_BYTES,
    EngineWord.DEMAND_BYTES,
)
"""Words of a row whose change may change a plan or a pressure level."""

RECLAIM_S = 5.0
"""An engine that owes bytes and has given none back for so long is overdue. They stay its own, because only the exit of
its processes frees them; but its pressure is CRITICAL, so that no new request is sent to it."""
LEND_AFTER_S = 2.0
"""A part of its guarantee that an engine has not asked for is lent after LEND_AFTER_S to twice that: an engine with
short requests is not made to ask for its bytes again with each of them."""
_PROMISE_STEPS = 4
"""Between floor and guarantee there are so many steps of what is promised, so that it changes rarely."""
_LONGEST_GAP_S = 1.0
"""Time between two samples counts at most this much: while the agent itself was away, nobody was late."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineTerms:
    """What an engine asks for when it registers. Sizes are bytes of the budget but for weights_bytes.

    registrar_pid: the process that starts the engine; weight: its part of contended and of lent bytes, against others'.
    start_bytes: what the start takes until the engine is live, KV memory that it maps at once included; the engine's
    processes must not be started before the lease holds that.
    Raises SettingsError on construction where a value cannot work on any device.
    """

    engine_id: str
    model: str
    guarantee_bytes: int
    ceiling_bytes: int
    weights_bytes: int
    registrar_pid: int
    weight: float = 1.0
    start_bytes: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.guarantee_bytes <= self.ceiling_bytes:
            raise SettingsError(
                f"engine {self.engine_id}: the guarantee is {self.guarantee_bytes} bytes, the ceiling "
                f"{self.ceiling_bytes}; 0 < guarantee <= ceiling is needed"
            )
        if min(self.weights_bytes, self.start_bytes) < 0 or not 0.001 <= self.weight <= 1e6:
            raise SettingsError(
                f"engine {self.engine_id}: weights_bytes is {self.weights_bytes}, start_bytes {self.start_bytes} and "
                f"weight {self.weight}; bytes of 0 or more and a weight from 0.001 to 1e6 fit"
            )
        for text in (self.engine_id, self.model):
            if not 0 < len(text.encode()) <= MAX_NAME_BYTES:
                raise SettingsError(f"name {text!r} has {len(text.encode())} bytes; 1 to {MAX_NAME_BYTES} fit")

    def stake(self) -> Stake:
        """Before the engine has a row."""
        return Stake(self.engine_id, self.guarantee_bytes, self.weights_bytes, self.start_bytes)


class Role(IntEnum):
    """The processes of an engine. Worker i has role WORKER_0 + i, up to MAX_WORKERS."""

    REGISTRAR = 0
    ENGINE = 1
    WORKER_0 = 2


def process_words(role: int) -> tuple[int, int]:
    """(word of the process id, word of its start time) of a role."""
    if role == Role.REGISTRAR:
        return AgentWord.REGISTRAR_PID, AgentWord.REGISTRAR_START
    if role == Role.ENGINE:
        return EngineWord.PID, AgentWord.ENGINE_START
    return EngineWord.WORKER_PID_0 + role - Role.WORKER_0, AgentWord.WORKER_START_0 + role - Role.WORKER_0


@dataclass
class Tenant:
    """A row in use, with what smooths it.

    demand, lately: its demand, smoothed for what it is given, and for what is kept for it.
    alive: roles of its processes that still run; watched: roles that have been on the board and are watched or gone;
    segments: files of shared memory that its processes have mapped.
    late_s: time for which it has owed bytes and given none back.
    """

    row: Row
    engine_id: str
    model: str
    demand: DemandPeak = field(default_factory=DemandPeak)
    lately: DemandPeak = field(default_factory=lambda: DemandPeak(hold_s=LEND_AFTER_S))
    pressure: Pressure = field(default_factory=Pressure)
    alive: set[int] = field(default_factory=set)
    watched: set[int] = field(default_factory=set)
    segments: set[Path] = field(default_factory=set)
    late_s: float = 0.0
    _sampled_s: float = float("inf")
    _sampled_bytes: int = 0

    @classmethod
    def begin(cls, row: Row, terms: EngineTerms) -> "Tenant":
        """Fill a cleared row; it leaves FREE by ``start``."""
        row.name(terms.engine_id, terms.model)
        row.set(AgentWord.REGISTRAR_PID, terms.registrar_pid)
        row.set(AgentWord.GUARANTEE_BYTES, terms.guarantee_bytes)
        row.set(AgentWord.CEILING_BYTES, terms.ceiling_bytes)
        row.set(AgentWord.WEIGHTS_BYTES, terms.weights_bytes)
        row.set(AgentWord.START_BYTES, terms.start_bytes)
        row.set(AgentWord.REGISTERED_NS, time.monotonic_ns())
        row.set(AgentWord.WEIGHT_MILLI, round(terms.weight * 1000))
        # Revision 1, because an engine's word reads 0 before it has acknowledged anything.
        row.set(AgentWord.LEASE, Lease(limit_bytes=0, revision=1).pack())
        return cls(row, terms.engine_id, terms.model)

    def limit(self, guarantee_bytes: int, ceiling_bytes: int) -> None:
        """Store both; in between, the ceiling is never below the guarantee."""
        row = self.row
        row.set(AgentWord.CEILING_BYTES, max(ceiling_bytes, self.guarantee_bytes))
        row.set(AgentWord.GUARANTEE_BYTES, guarantee_bytes)
        row.set(AgentWord.CEILING_BYTES, ceiling_bytes)

    @property
    def state(self) -> RowState:
        return self.row.state

    def enter(self, state: RowState) -> None:
        self.row.set(AgentWord.STATE, state)

    @property
    def stays(self) -> bool:
        """Has a guarantee: it is neither gone nor on its way out."""
        return self.state in (RowState.STARTING, RowState.LIVE)

    @property
    def guarantee_bytes(self) -> int:
        return self.row.get(AgentWord.GUARANTEE_BYTES)

    @property
    def weights_bytes(self) -> int:
        return self.row.get(AgentWord.WEIGHTS_BYTES)

    @property
    def start_bytes(self) -> int:
        """Of the budget, what its start takes; 0 once it has started."""
        return self.row.get(AgentWord.START_BYTES) if self.state is RowState.STARTING else 0

    def stake(self) -> Stake:
        """What it can count on of the device."""
        row = self.row
        return Stake(
            engine_id=self.engine_id,
            guarantee_bytes=self.guarantee_bytes,
            weights_bytes=self.weights_bytes,
            start_bytes=self.start_bytes,
            held_bytes=self.held_bytes,
            registered_ns=row.get(AgentWord.REGISTERED_NS),
        )

    @property
    def held_bytes(self) -> int:
        """The most the engine may hold at this moment."""
        row = self.row
        return max(row.lease.limit_bytes, row.get(AgentWord.EXPOSURE_BYTES), row.get(EngineWord.COMMITTED_BYTES))

    @property
    def owed_bytes(self) -> int:
        """What it may hold above its limit, or all of it when it is on its way out."""
        return self.held_bytes - (self.row.lease.limit_bytes if self.stays else 0)

    @property
    def overdue_bytes(self) -> int:
        """What it owes, where it has given nothing back for RECLAIM_S; else 0."""
        return self.owed_bytes if self.late_s >= RECLAIM_S else 0

    @property
    def promised_bytes(self) -> int:
        """Of the guarantee, what is kept for the engine: what it has asked for lately, and at least its floor."""
        guarantee = self.guarantee_bytes
        floor = min(self.row.get(EngineWord.FLOOR_BYTES), guarantee)
        step = max(1, (guarantee - floor) // _PROMISE_STEPS)
        steps = -(-max(0, self.lately.demand_bytes - floor) // step)
        return min(guarantee, floor + steps * step)

    @property
    def wanted_bytes(self) -> int:
        """What requests reference or could use now."""
        return max(self.row.get(EngineWord.USED_BYTES), self.demand.demand_bytes)

    def roles(self) -> list[int]:
        """Roles whose process ids are on the board."""
        if not self.row.get(EngineWord.PID):
            return [Role.REGISTRAR]
        workers = min(self.row.get(EngineWord.WORKER_COUNT), MAX_WORKERS)
        return [Role.REGISTRAR, Role.ENGINE, *range(Role.WORKER_0, Role.WORKER_0 + workers)]

    def sample(self, now_s: float) -> list[int]:
        """Take a sample of the demand, and return all words that planning and pressure follow. now_s: monotonic."""
        demand_bytes = self.row.get(EngineWord.DEMAND_BYTES)
        self.demand, self.lately = (peak.observed(demand_bytes, now_s) for peak in (self.demand, self.lately))
        self._follow_debt(now_s)
        return [*(self.row.get(word) for word in _FOLLOWED), int(self.overdue_bytes > 0), self.promised_bytes]

    def press(self) -> None:
        """Take a sample of the pressure: wanted bytes against what can be had, which is the limit or the guarantee, or
        beyond all measure where it is overdue. A row that is not LIVE has none."""
        live = self.state is RowState.LIVE
        ratio = usage_ratio(self.wanted_bytes, max(self.row.lease.limit_bytes, self.guarantee_bytes)) if live else 0.0
        self.pressure = self.pressure.sampled(float("inf") if live and self.overdue_bytes else ratio)

    def claim(self, its_turn: bool = True) -> LeaseClaim:
        """The engine's claim by the board, its acknowledgement taken into account.

        A row that is STARTING claims its guarantee and, in ``its_turn``, what its start takes, and no more: an engine
        that reads no lease yet could not give a lent byte back.
        """
        row = self.row
        # This word first: the engine stores its count before its acknowledgement, see EngineWord.APPLIED_REVISION.
        applied = row.get(EngineWord.APPLIED_REVISION)
        lease = row.lease
        if applied == lease.revision and row.get(AgentWord.EXPOSURE_BYTES) != lease.limit_bytes:
            row.set(AgentWord.EXPOSURE_BYTES, lease.limit_bytes)
        claim = LeaseClaim(
            engine_id=self.engine_id,
            guarantee_bytes=self.guarantee_bytes,
            ceiling_bytes=row.get(AgentWord.CEILING_BYTES),
            committed_bytes=row.get(EngineWord.COMMITTED_BYTES),
            exposure_bytes=row.get(AgentWord.EXPOSURE_BYTES),
            demand_bytes=self.demand.demand_bytes,
            limit_bytes=lease.limit_bytes,
            weight_milli=row.get(AgentWord.WEIGHT_MILLI),
            promised_bytes=self.promised_bytes,
        )
        if self.state is RowState.STARTING:
            whole = max(self.guarantee_bytes, self.start_bytes if its_turn else 0)
            return replace(claim, guarantee_bytes=whole, ceiling_bytes=whole, demand_bytes=whole, promised_bytes=whole)
        return claim

    def issue(self, decision: LeaseDecision) -> None:
        """Publish a decision; one that changes nothing leaves the revision alone."""
        row, old = self.row, self.row.lease
        row.set(AgentWord.TARGET_BYTES, decision.goal_bytes)
        if decision.limit_bytes == old.limit_bytes:
            return
        # The exposure goes first: should this process die in between, it errs on the safe side.
        row.set(AgentWord.EXPOSURE_BYTES, max(row.get(AgentWord.EXPOSURE_BYTES), decision.limit_bytes))
        row.set(AgentWord.LEASE, Lease(decision.limit_bytes, old.revision + 1).pack())
        self._count_loan(old.limit_bytes, decision.limit_bytes)
        change = f"{old.limit_bytes} -> {decision.limit_bytes} bytes, revision {old.revision + 1}"
        logger.info("lease of %s: %s; demand %d: %s", self.engine_id, change, self.demand.demand_bytes, decision.reason)

    def _count_loan(self, before_bytes: int, now_bytes: int) -> None:
        """Count what of a change of the limit is borrowed beyond the guarantee, or lent of it. An engine that has not
        started does neither."""
        if self.state is not RowState.LIVE:
            return
        guarantee = self.guarantee_bytes
        borrowed = max(0, now_bytes - max(before_bytes, guarantee))
        lent = max(0, min(before_bytes, guarantee) - now_bytes)
        for moved, count_word, bytes_word in (
            (borrowed, AgentWord.BORROW_COUNT, AgentWord.BORROW_BYTES),
            (lent, AgentWord.LEND_COUNT, AgentWord.LEND_BYTES),
        ):
            if moved:
                self.row.set(count_word, self.row.get(count_word) + 1)
                self.row.set(bytes_word, self.row.get(bytes_word) + moved)

    def _follow_debt(self, now_s: float) -> None:
        """Count the time for which bytes are owed and none come back; say when it has become too long, and its end."""
        was_late = self.late_s >= RECLAIM_S
        waited = self.owed_bytes > 0 and self.held_bytes >= self._sampled_bytes
        self.late_s = self.late_s + min(max(now_s - self._sampled_s, 0.0), _LONGEST_GAP_S) if waited else 0.0
        self._sampled_s, self._sampled_bytes = now_s, self.held_bytes
        late = self.late_s >= RECLAIM_S
        if late and not was_late:
            logger.warning(
                "engine %s has owed %d bytes for %.0f s: stopped, or in a long step; others wait for them, and it gets "
                "no new requests",
                self.engine_id,
                self.owed_bytes,
                self.late_s,
            )
        elif was_late and not late:
            logger.info("engine %s gives back what it owed", self.engine_id)
