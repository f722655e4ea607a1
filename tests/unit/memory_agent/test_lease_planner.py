"""The lease planner: guarantees, shares, release before grant, and no ping-pong; by example and by property."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from memory_agent.errors import SettingsError
from memory_agent.lease_board import LIMIT_UNIT_BYTES
from memory_agent.lease_planner import LeaseClaim, LeaseDecision, LeaseReason, check_guarantees, plan_leases

UNIT = LIMIT_UNIT_BYTES
BUDGET = 1024 * UNIT
BAND = BUDGET // 32


@dataclass
class Engine:
    """A simulated engine that follows the board's protocol, as slowly or partially as a test likes."""

    name: str
    guarantee: int
    ceiling: int = BUDGET
    weight: int = 1000
    demand: int = 0
    limit: int = 0
    revision: int = 1
    exposure: int = 0
    read: tuple[int, int] = (0, 0)
    acknowledged: int = 0
    committed: int = 0
    floor: int | None = None
    changes: list[int] = field(default_factory=list)

    @property
    def promised(self) -> int:
        """All of the guarantee, or where there is a floor, as much of it as is asked for."""
        return self.guarantee if self.floor is None else min(self.guarantee, max(self.floor, self.demand))

    def claim(self) -> LeaseClaim:
        if self.acknowledged == self.revision:
            self.exposure = self.limit
        return LeaseClaim(
            self.name,
            self.guarantee,
            self.ceiling,
            self.committed,
            self.exposure,
            self.demand,
            self.limit,
            self.weight,
            self.promised,
        )

    def take(self, decision: LeaseDecision) -> None:
        if decision.limit_bytes != self.limit:
            self.limit = decision.limit_bytes
            self.revision += 1
            self.exposure = max(self.exposure, self.limit)
            self.changes.append(self.limit)

    def read_lease(self) -> None:
        self.read = (self.revision, self.limit)

    def commit(self, wanted: int) -> None:
        """Grow as far as the lease it has read allows; never shrinks."""
        self.committed = max(self.committed, min(wanted, self.read[1]))

    def follow(self) -> None:
        """What an honest engine does in one step."""
        self.read_lease()
        self.commit(self.demand)
        self.committed = min(self.committed, self.read[1])
        self.acknowledged = self.read[0]


def tick(engines: Sequence[Engine], budget: int = BUDGET, reserved: int = 0) -> list[LeaseDecision]:
    """One round of the planner; checks what must hold of every round."""
    claims = [engine.claim() for engine in engines]
    before = sum(claim.held_bytes for claim in claims) + reserved
    decisions = plan_leases(claims, budget, reserved)
    for engine, decision in zip(engines, decisions, strict=True):
        engine.take(decision)
    after = sum(engine.claim().held_bytes for engine in engines) + reserved
    assert after <= max(budget, before)
    assert all(decision.limit_bytes % UNIT == 0 for decision in decisions)
    return decisions


def settle(engines: Sequence[Engine], rounds: int = 12, budget: int = BUDGET) -> None:
    """Rounds in which every engine follows at once."""
    for _ in range(rounds):
        tick(engines, budget)
        for engine in engines:
            engine.follow()


def test_unasked_bytes_are_lent_evenly() -> None:
    """Two idle engines of equal weight share the whole budget, so that neither needs a round trip to grow."""
    engines = [Engine("a", 100 * UNIT), Engine("b", 100 * UNIT)]
    settle(engines)
    assert [engine.limit for engine in engines] == [BUDGET // 2, BUDGET // 2]


def test_lending_follows_the_weight() -> None:
    """An engine of three times the weight is lent three times the bytes beyond the guarantees."""
    engines = [Engine("a", 112 * UNIT, weight=3000), Engine("b", 112 * UNIT)]
    settle(engines)
    assert [engine.limit for engine in engines] == [712 * UNIT, 312 * UNIT]


def test_one_engine_gets_what_the_others_do_not_use() -> None:
    """A greedy engine gets all but the idle one's guarantee; when the other asks, both get equal shares."""
    greedy, idle = engines = [Engine("a", 100 * UNIT, demand=BUDGET), Engine("b", 100 * UNIT)]
    settle(engines)
    assert greedy.limit == greedy.committed == BUDGET - 100 * UNIT
    assert idle.limit == 100 * UNIT
    idle.demand = BUDGET
    settle(engines)
    assert greedy.committed == idle.committed == BUDGET // 2


def test_a_guarantee_that_is_not_asked_for_is_lent() -> None:
    """A greedy engine gets all but the idle one's floor; asked for, the guarantee comes back before the other's
    demand."""
    greedy, idle = engines = [Engine("a", 100 * UNIT, demand=BUDGET), Engine("b", 400 * UNIT, floor=10 * UNIT)]
    settle(engines)
    assert (greedy.limit, idle.limit) == (BUDGET - 10 * UNIT, 10 * UNIT)
    idle.demand = 300 * UNIT
    settle(engines)
    assert (greedy.limit, idle.limit) == (BUDGET - 300 * UNIT, 300 * UNIT)


def test_grant_waits_for_the_release() -> None:
    """The engine that gives back is lowered at once; the one that asked is raised only as bytes really come free."""
    greedy, asking = engines = [Engine("a", 100 * UNIT, demand=BUDGET), Engine("b", 100 * UNIT)]
    settle(engines)
    asking.demand = BUDGET
    decisions = tick(engines)
    assert greedy.limit == BUDGET // 2
    assert asking.limit == 100 * UNIT
    assert decisions[1].reason is LeaseReason.WAITING
    assert decisions[1].goal_bytes == BUDGET // 2
    for _ in range(50):
        tick(engines)
        assert asking.limit == 100 * UNIT, "nothing was given back"
    greedy.read_lease()
    greedy.acknowledged = greedy.read[0]
    tick(engines)
    assert asking.limit == 100 * UNIT, "acknowledged, but not yet given back"
    greedy.committed = 724 * UNIT
    tick(engines)
    assert asking.limit == 300 * UNIT
    greedy.follow()
    tick(engines)
    assert asking.limit == BUDGET // 2


def test_silent_engine_keeps_its_exposure() -> None:
    """A lowered engine that reads nothing (a stopped process) counts with all it may hold, however often we plan."""
    silent, asking = engines = [Engine("a", 100 * UNIT), Engine("b", 100 * UNIT)]
    settle(engines)
    asking.demand = BUDGET
    for _ in range(20):
        tick(engines)
        asking.follow()
    assert silent.limit == 100 * UNIT
    assert asking.limit == BUDGET // 2
    silent.follow()
    tick(engines)
    assert asking.limit == BUDGET - 100 * UNIT


def test_reserved_bytes_are_not_lent() -> None:
    """Bytes of processes on their way out are left alone until they are gone."""
    engine = Engine("a", 100 * UNIT, demand=BUDGET)
    tick([engine], reserved=600 * UNIT)
    assert engine.limit == 424 * UNIT
    tick([engine])
    assert engine.limit == BUDGET


def test_newcomer_gets_its_guarantee_back_from_lenders() -> None:
    """An engine that arrives when all is lent gets its guarantee as soon as the others have given back."""
    old, new = Engine("a", 100 * UNIT, demand=BUDGET), Engine("b", 300 * UNIT)
    settle([old])
    assert old.limit == BUDGET
    tick([old, new])
    assert (old.limit, new.limit) == (724 * UNIT, 0)
    old.follow()
    tick([old, new])
    assert new.limit == 300 * UNIT


def test_lowered_budget_takes_effect_without_growth() -> None:
    """Below a lowered budget nobody is raised until what is held fits it, and then the limits fit it."""
    engines = [Engine("a", 10 * UNIT, demand=BUDGET), Engine("b", 10 * UNIT, demand=BUDGET)]
    settle(engines)
    tick(engines, budget=BUDGET // 2)
    assert sum(engine.limit for engine in engines) == BUDGET // 2
    settle(engines, budget=BUDGET // 2)
    assert sum(engine.committed for engine in engines) == BUDGET // 2


def test_ceiling_caps_at_once() -> None:
    """A lowered ceiling lowers the limit in the next round, and the bytes go to the other."""
    capped, other = engines = [Engine("a", 10 * UNIT), Engine("b", 10 * UNIT)]
    settle(engines)
    capped.ceiling = 64 * UNIT
    assert tick(engines)[0].reason is LeaseReason.CAPPED
    settle(engines)
    assert (capped.limit, other.limit) == (64 * UNIT, 960 * UNIT)


def test_guarantees_beyond_the_budget_are_refused_with_the_numbers() -> None:
    """The error names what is needed, what there is, and what would fit."""
    with pytest.raises(SettingsError, match=rf"need {1100 * UNIT} bytes.*is {BUDGET}.*{1100 * UNIT} bytes or more"):
        check_guarantees({"a": 600 * UNIT, "b": 500 * UNIT}, BUDGET)
    with pytest.raises(SettingsError):
        plan_leases([Engine("a", BUDGET + 1).claim()], BUDGET)


def test_small_growth_changes_no_limit() -> None:
    """Demand that grows inside the lent part moves nothing: no round trip, nobody is woken."""
    engines = [Engine("a", 100 * UNIT), Engine("b", 100 * UNIT)]
    settle(engines)
    for demand in range(100, 384, 4):
        engines[0].demand = demand * UNIT
        settle(engines, rounds=1)
    assert [len(engine.changes) for engine in engines] == [1, 1]


def test_headroom_is_provided_ahead_of_need() -> None:
    """Demand that comes near its limit is given room before it reaches it, from what others are only lent."""
    engines = [Engine("a", 100 * UNIT, demand=480 * UNIT), Engine("b", 100 * UNIT)]
    for engine in engines:
        engine.limit = 512 * UNIT
    settle(engines)
    assert engines[0].limit == 480 * UNIT + (BUDGET - 580 * UNIT) // 2


def test_crumbs_wake_nobody() -> None:
    """Less than a dead band that comes free is not worth waking idle engines for."""
    engines = [Engine("a", 32 * UNIT), Engine("b", 32 * UNIT)]
    small = Engine("c", 16 * UNIT, ceiling=16 * UNIT)
    settle([*engines, small])
    limits = [engine.limit for engine in engines]
    settle(engines)
    assert [engine.limit for engine in engines] == limits
    assert sum(limits) == BUDGET - 16 * UNIT


def test_headroom_comes_in_pieces_of_a_dead_band() -> None:
    """An engine that has what it needs is not given its headroom unit by unit while another gives back slowly."""
    giver, taker = engines = [Engine("a", 100 * UNIT), Engine("b", 100 * UNIT, demand=500 * UNIT)]
    for engine in engines:
        engine.limit = engine.committed = engine.exposure = 512 * UNIT
    while giver.committed > 0:
        tick(engines)
        giver.read_lease()
        giver.acknowledged = giver.read[0]
        giver.committed -= UNIT
        taker.follow()
    assert taker.limit > 500 * UNIT + (BUDGET - 600 * UNIT) // 2 - BAND
    assert 2 <= len(taker.changes) <= (taker.limit - 512 * UNIT) // BAND + 1


def test_uneven_commitment_is_not_rounded_in_its_favour() -> None:
    """Held bytes that are no multiple of the unit never let a limit rise past what is held when nothing is free."""
    claims = [
        LeaseClaim("a", 101 * UNIT, BUDGET, 100 * UNIT + 1, 0, BUDGET, 50 * UNIT),
        LeaseClaim("b", 98 * UNIT, BUDGET, 99 * UNIT + 7, 0, BUDGET, 50 * UNIT),
    ]
    held = sum(claim.held_bytes for claim in claims)
    decisions = plan_leases(claims, held)
    assert [decision.limit_bytes for decision in decisions] == [100 * UNIT, 98 * UNIT]


class AdversarialEngines(RuleBasedStateMachine):
    """Engines that follow the protocol in any order and at any pace; also ones that come, go and change their mind."""

    engines = Bundle("engines")

    @initialize(budget=st.integers(64, 4096))
    def begin(self, budget: int) -> None:
        self.budget = budget * UNIT + 17
        self.all: list[Engine] = []
        self.arrived = 0
        self.allowed = self.budget

    @rule(
        target=engines,
        guarantee=st.integers(1, 400 * UNIT),
        weight=st.sampled_from([1, 500, 1000, 9000]),
        lends=st.booleans(),
    )
    def arrive(self, guarantee: int, weight: int, lends: bool) -> Engine:
        self.arrived += 1  # a name is never used again, as an engine's id is not
        engine = Engine(str(self.arrived), guarantee, ceiling=max(guarantee, self.budget), weight=weight)
        engine.floor = guarantee // 8 if lends else None
        try:
            check_guarantees({one.name: one.guarantee for one in [*self.all, engine]}, self.budget)
        except SettingsError:
            return engine  # refused: it never takes part
        self.all.append(engine)
        return engine

    @rule(engine=engines, demand=st.integers(0, 5000 * UNIT))
    def demands(self, engine: Engine, demand: int) -> None:
        engine.demand = demand

    @rule(engine=engines)
    def reads(self, engine: Engine) -> None:
        engine.read_lease()

    @rule(engine=engines, wanted=st.integers(0, 5000 * UNIT))
    def commits(self, engine: Engine, wanted: int) -> None:
        engine.commit(wanted)

    @rule(engine=engines, left=st.floats(0, 1))
    def gives_back(self, engine: Engine, left: float) -> None:
        engine.committed = int(engine.committed * left)

    @rule(engine=engines)
    def acknowledges(self, engine: Engine) -> None:
        """It may still hold more than the lease it acknowledges: shrinking takes time."""
        engine.acknowledged = engine.read[0]

    @rule(engine=engines, ceiling=st.integers(0, 5000 * UNIT))
    def is_capped(self, engine: Engine, ceiling: int) -> None:
        engine.ceiling = max(ceiling, engine.guarantee)

    @rule(engine=engines, guarantee=st.integers(1, 1000 * UNIT))
    def is_guaranteed(self, engine: Engine, guarantee: int) -> None:
        """Another guarantee while it runs; one that does not fit is refused."""
        others = {one.name: one.guarantee for one in self.all if one is not engine}
        try:
            check_guarantees(others | {engine.name: guarantee}, self.budget)
        except SettingsError:
            return
        engine.guarantee, engine.ceiling = guarantee, max(engine.ceiling, guarantee)

    @rule(engine=engines)
    def dies(self, engine: Engine) -> None:
        if engine in self.all:
            self.all.remove(engine)

    @rule(rounds=st.integers(1, 4))
    def plans(self, rounds: int) -> None:
        for _ in range(rounds):
            tick(self.all, self.budget)

    @invariant()
    def inside_the_budget(self) -> None:
        if hasattr(self, "all"):
            assert sum(engine.committed for engine in self.all) <= self.budget
            assert sum(engine.claim().held_bytes for engine in self.all) <= self.budget

    def teardown(self) -> None:
        """However the trace went: when all follow, each gets what is promised, and what its demand deserves but a band;
        and when all ask for it, each gets its guarantee."""
        if not getattr(self, "all", None):
            return
        settle(self.all, rounds=20, budget=self.budget)
        for engine, deserved in zip(self.all, reference_shares(self.all, self.budget), strict=True):
            assert engine.limit >= engine.promised
            assert engine.limit >= deserved - self.budget // 32 - (len(self.all) + 1) * UNIT
            assert engine.limit < max(engine.ceiling, engine.guarantee) + UNIT
        changes = sum(len(engine.changes) for engine in self.all)
        settle(self.all, rounds=10, budget=self.budget)
        assert sum(len(engine.changes) for engine in self.all) == changes, "constant demand, but limits go on moving"
        for engine in self.all:
            engine.demand = self.budget
        settle(self.all, rounds=20, budget=self.budget)
        assert all(engine.limit >= engine.guarantee for engine in self.all)


def reference_shares(engines: Sequence[Engine], budget: int) -> list[float]:
    """Weighted max-min fair shares above what is promised, by bisection on the water level."""
    wants = [max(0, min(engine.demand, engine.ceiling) - engine.promised) for engine in engines]
    surplus = budget - sum(engine.promised for engine in engines)
    low, high = 0.0, 2.0 * max(budget, 1)
    for _ in range(100):
        level = (low + high) / 2
        used = sum(min(want, level * engine.weight) for want, engine in zip(wants, engines, strict=True))
        low, high = (level, high) if used <= surplus else (low, level)
    return [engine.promised + min(want, low * engine.weight) for want, engine in zip(wants, engines, strict=True)]


AdversarialEngines.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestAdversarialEngines = AdversarialEngines.TestCase


@given(
    seed=st.integers(0, 2**32),
    bases=st.lists(st.integers(0, BUDGET // UNIT), min_size=2, max_size=5),
    greedy=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_noise_below_the_dead_band_moves_nothing(seed: int, bases: list[int], greedy: bool) -> None:
    """Demand that jitters by less than a tenth of the dead band, at any level, leaves the limits alone once settled."""
    noise = random.Random(seed)
    engines = [Engine(str(index), 32 * UNIT) for index in range(len(bases) + greedy)]
    for round_ in range(200):
        for engine, base in zip(engines, bases, strict=False):
            engine.demand = max(0, base * UNIT + noise.randint(-BAND // 10, BAND // 10))
        if greedy:
            engines[-1].demand = 2 * BUDGET
        if round_ == 50:
            for engine in engines:
                engine.changes.clear()
        settle(engines, rounds=1)
    assert sum(len(engine.changes) for engine in engines) <= len(engines)
