"""Who may hold how much of one device's KV budget: a pure function of what the engines claim.

    0        promised             demand met            limit            ceiling
    |------------|----------------------|-------------------|----------------|
      kept for it   shared by demand      lent while nobody
                    (weighted max-min)    asks (by weight)

Promised is as much of an engine's guarantee as it has asked for lately. The rest of the guarantee is lent, and comes
back as soon as it is asked for, before anybody's demand beyond the own guarantee.

Two properties carry the design.

- *No over-commitment.* What an engine may hold at this moment is ``max(limit, exposure, committed)``: it may not have
  seen a lowered limit yet. The sum of that over all engines never grows past the budget: a limit is lowered at once,
  and raised only by bytes that are really free. Grants follow releases.
- *No ping-pong.* Every change of a limit wakes an idle engine, so limits move only when an engine has too little: when
  its limit falls a dead band short of its share, headroom included. Then all limits go to their shares, and noise
  smaller than the dead band moves nothing afterwards.

The filling order is that of max-min fairness (Bertsekas and Gallager, Data Networks, section 6.5.2), with weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from memory_agent.errors import SettingsError
from memory_agent.lease_board import LIMIT_UNIT_BYTES

_DEAD_BAND_SHARE = 32
"""A limit may be this fraction (1/32) of the budget off its share before anybody is made to give back for it."""
_HEADROOM_SHARE = 8
"""Room above its demand (1/8 of the budget) that an engine should have in hand, where the lent part allows it."""


class LeaseReason(StrEnum):
    """Why a decision is what it is."""

    KEEP = "within the dead band"
    LOWERED = "lowered to its share: another engine needs the bytes"
    CAPPED = "lowered to its ceiling"
    RAISED = "raised from free bytes"
    WAITING = "short: waits until other engines have given back"


@dataclass(frozen=True)
class LeaseClaim:
    """One engine as the planner sees it.

    Attributes:
        guarantee_bytes: always obtainable; ceiling_bytes: never exceeded; both rounded up to LIMIT_UNIT_BYTES.
        promised_bytes: of the guarantee, what is kept for the engine now; None for all of it.
        committed_bytes: what the engine may hold by its own count.
        exposure_bytes: highest limit issued since the one it last acknowledged.
        demand_bytes: what it could use now; limit_bytes: the limit issued last.
        weight_milli: share of contended and of lent bytes, in thousandths.
    """

    engine_id: str
    guarantee_bytes: int
    ceiling_bytes: int
    committed_bytes: int
    exposure_bytes: int
    demand_bytes: int
    limit_bytes: int
    weight_milli: int = 1000
    promised_bytes: int | None = None

    @property
    def held_bytes(self) -> int:
        """The most this engine can hold at this moment, whatever it has seen or not seen."""
        return max(self.limit_bytes, self.exposure_bytes, self.committed_bytes)


@dataclass(frozen=True)
class LeaseDecision:
    """The limit to issue now, and the one it is on the way to: above it while others still give back."""

    engine_id: str
    limit_bytes: int
    goal_bytes: int
    reason: LeaseReason


def check_guarantees(guarantees_bytes: dict[str, int], budget_bytes: int) -> None:
    """Raise SettingsError where the guarantees, in whole units, do not fit the budget."""
    needed = sum(_units_up(value) for value in guarantees_bytes.values()) * LIMIT_UNIT_BYTES
    if needed > budget_bytes:
        each = ", ".join(f"{engine} {value}" for engine, value in guarantees_bytes.items())
        raise SettingsError(
            f"the guarantees of {len(guarantees_bytes)} engines need {needed} bytes, the KV budget of the device is "
            f"{budget_bytes} ({each}); a budget of {needed} bytes or more, fewer replicas or a lower max_model_len fit"
        )


def plan_leases(claims: Sequence[LeaseClaim], budget_bytes: int, reserved_bytes: int = 0) -> list[LeaseDecision]:
    """One decision per claim, in the order of the claims. Pure.

    reserved_bytes are held by processes that are on their way out: neither lent nor counted on. Limits are multiples
    of LIMIT_UNIT_BYTES. The sum of ``held_bytes`` plus reserved_bytes, if it was inside the budget, stays inside it; if
    it was not (the budget was lowered), it does not grow. Raises SettingsError where the guarantees do not fit.
    """
    check_guarantees({claim.engine_id: claim.guarantee_bytes for claim in claims}, budget_bytes)
    wants = [_Want.of(claim) for claim in claims]
    # The reserved bytes come back soon, so they never push the plan below what is promised.
    pool = max(_units_down(budget_bytes - reserved_bytes), sum(want.promised for want in wants))
    deserved, shares = _shares(wants, pool)
    goals = _goals(wants, deserved, shares, pool)
    free = max(0, _units_down(budget_bytes - reserved_bytes - sum(want.held for want in wants) * LIMIT_UNIT_BYTES))
    limits = _issue(wants, goals, deserved, free, pool)
    return [
        LeaseDecision(claim.engine_id, limit * LIMIT_UNIT_BYTES, goal * LIMIT_UNIT_BYTES, _reason(want, limit, goal))
        for claim, want, limit, goal in zip(claims, wants, limits, goals, strict=True)
    ]


@dataclass(frozen=True)
class _Want:
    """A claim in units of LIMIT_UNIT_BYTES, its demand clipped to [promised, ceiling].

    held: what it may hold, rounded up, to count against the budget; costless: rounded down, to raise a limit to.
    """

    promised: int
    ceiling: int
    demand: int
    limit: int
    held: int
    costless: int
    weight: int

    @classmethod
    def of(cls, claim: LeaseClaim) -> "_Want":
        guarantee = _units_up(claim.guarantee_bytes)
        ceiling = max(_units_up(claim.ceiling_bytes), guarantee)
        promised = guarantee if claim.promised_bytes is None else min(_units_up(claim.promised_bytes), guarantee)
        demand = min(max(_units_up(claim.demand_bytes), promised), ceiling)
        limit, held = _units_down(claim.limit_bytes), _units_up(claim.held_bytes)
        return cls(promised, ceiling, demand, limit, held, _units_down(claim.held_bytes), claim.weight_milli)


def _shares(wants: Sequence[_Want], pool: int) -> tuple[list[int], list[int]]:
    """(what each engine's demand deserves, the same plus its part of what nobody demands)."""
    weights = [want.weight for want in wants]
    surplus = pool - sum(want.promised for want in wants)
    asked = _water_fill([want.demand - want.promised for want in wants], weights, surplus)
    deserved = [want.promised + more for want, more in zip(wants, asked, strict=True)]
    lent = _water_fill(
        [want.ceiling - base for want, base in zip(wants, deserved, strict=True)], weights, surplus - sum(asked)
    )
    return deserved, [base + more for base, more in zip(deserved, lent, strict=True)]


def _goals(wants: Sequence[_Want], deserved: Sequence[int], shares: Sequence[int], pool: int) -> list[int]:
    """The limits to move towards: the present ones plus what is unissued, or the shares where that leaves one short."""
    band = _dead_band(pool)
    gaps = [max(share - want.limit, 0) for want, share in zip(wants, shares, strict=True)]
    unissued = pool - sum(want.limit for want in wants)
    lifts = _water_fill(gaps, [want.weight for want in wants], max(unissued, 0))
    short = [
        want.limit + lift < max(want.promised, min(need + pool // _HEADROOM_SHARE, share) - band)
        for want, lift, need, share in zip(wants, lifts, deserved, shares, strict=True)
    ]
    contended = unissued < 0 or any(short)
    goals = []
    for want, lift, need, share in zip(wants, lifts, deserved, shares, strict=True):
        rise = max(share - want.limit, 0) if contended else lift
        if contended and share < want.limit:
            goals.append(share)
        elif rise >= band or want.limit < need:
            goals.append(want.limit + rise)
        else:
            goals.append(min(want.limit, want.ceiling))
    return goals


def _issue(wants: Sequence[_Want], goals: Sequence[int], deserved: Sequence[int], free: int, pool: int) -> list[int]:
    """The goals as far as they can be issued now: lowered at once, raised from ``free`` bytes alone.

    Raising a limit up to what the engine may hold anyway costs nothing. What is promised is served before the rest,
    and a raise smaller than the dead band waits for more, unless it completes the goal or the engine has less than its
    demand deserves.
    """
    weights = [want.weight for want in wants]
    costless = [min(goal, want.costless) for want, goal in zip(wants, goals, strict=True)]
    first = _water_fill(
        [max(min(want.promised, goal) - base, 0) for want, goal, base in zip(wants, goals, costless, strict=True)],
        weights,
        free,
    )
    rest = [goal - base - part for goal, base, part in zip(goals, costless, first, strict=True)]
    second = _water_fill(rest, weights, free - sum(first))
    limits = []
    for want, goal, need, base, urgent, more in zip(wants, goals, deserved, costless, first, second, strict=True):
        limit = base + urgent + more
        small = 0 < limit - want.limit < min(_dead_band(pool), goal - want.limit)
        limits.append(want.limit if small and want.limit >= need else limit)
    return limits


def _water_fill(wants: Sequence[int], weights: Sequence[int], amount: int) -> list[int]:
    """Weighted max-min fair parts of ``amount``: none above its want, in whole units; rounding leaves less than one
    unit an engine undistributed."""
    parts = [0] * len(wants)
    open_ = [index for index, want in enumerate(wants) if want > 0]
    while open_ and amount > 0:
        total = sum(weights[index] for index in open_)
        sated = [index for index in open_ if wants[index] * total <= amount * weights[index]]
        if not sated:
            for index in open_:
                parts[index] = amount * weights[index] // total
            break
        for index in sated:
            parts[index] = wants[index]
        amount -= sum(wants[index] for index in sated)
        open_ = [index for index in open_ if parts[index] == 0]
    return parts


def _reason(want: _Want, limit: int, goal: int) -> LeaseReason:
    if limit < want.limit:
        return LeaseReason.CAPPED if want.limit > want.ceiling else LeaseReason.LOWERED
    if limit > want.limit:
        return LeaseReason.RAISED
    return LeaseReason.WAITING if goal > limit else LeaseReason.KEEP


def _dead_band(pool: int) -> int:
    return max(1, pool // _DEAD_BAND_SHARE)


def _units_up(value_bytes: int) -> int:
    return -(-value_bytes // LIMIT_UNIT_BYTES)


def _units_down(value_bytes: int) -> int:
    return value_bytes // LIMIT_UNIT_BYTES
