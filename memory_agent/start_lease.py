"""What the start of an engine takes of a device, whether it can ever have it, and whose turn it is. Pure.

    budget      |<- guarantees of all engines ->|<- start beyond its own guarantee ->|<- lent to who wants it ->|
    beside it   |<- weights, in the room set aside for them ->|     what they take beyond it, the budget is less

A start takes KV memory that is mapped at once, and what loading holds for a while beside the weights. It has that from
the engine's own guarantee as far as this reaches, and from bytes that are lent to others beyond it; never from the
guarantee of another, which could not have it back before the start is over. Where not all of those that start fit at
once, they take turns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from memory_agent.errors import SettingsError
from memory_agent.lease_board import LIMIT_UNIT_BYTES
from memory_agent.lease_planner import check_guarantees


@dataclass(frozen=True)
class Stake:
    """What one engine can count on of its device.

    Attributes:
        guarantee_bytes: of the budget, always obtainable.
        weights_bytes: held beside the budget from the start to the exit of the last process.
        start_bytes: of the budget, what the start takes; 0 for an engine that is live.
        held_bytes: of the budget, the most it may hold now; registered_ns: when, by any one clock.
    """

    engine_id: str
    guarantee_bytes: int
    weights_bytes: int = 0
    start_bytes: int = 0
    held_bytes: int = 0
    registered_ns: int = 0

    @property
    def extra_bytes(self) -> int:
        """What the start takes beyond the guarantee, in whole units."""
        return max(0, _whole(self.start_bytes) - _whole(self.guarantee_bytes))

    @property
    def granted(self) -> bool:
        """Its lease holds the start, or did: the engine's processes may be there already."""
        return self.held_bytes >= self.start_bytes


def excess_bytes(weights_bytes: int, room_bytes: int) -> int:
    """What weights of so many bytes take of the budget, where ``room_bytes`` are set aside for them."""
    return max(0, weights_bytes - room_bytes)


def check_stakes(stakes: Sequence[Stake], budget_bytes: int, room_bytes: int) -> None:
    """Raise SettingsError, with the numbers and what would fit, where the guarantees do not fit the budget beside
    weights without room of their own, or where one of the starts would not fit even when nothing is lent."""
    guarantees = {stake.engine_id: stake.guarantee_bytes for stake in stakes}
    check_guarantees(guarantees, budget_bytes)
    weights = sum(stake.weights_bytes for stake in stakes)
    spare = _spare(stakes, budget_bytes, room_bytes)
    if spare < 0:
        raise SettingsError(
            f"the weights of {len(stakes)} engines need {weights} bytes, {room_bytes} are set aside for them; the rest "
            f"does not fit beside the guarantees into the budget of {budget_bytes}; a budget of {budget_bytes - spare} "
            f"bytes or more, {room_bytes - spare} bytes for weights, or fewer replicas fit"
        )
    for stake in stakes:
        if stake.extra_bytes > spare:
            raise SettingsError(
                f"engine {stake.engine_id} can never start: its start takes {stake.start_bytes} bytes, "
                f"{stake.extra_bytes} more than its guarantee, and beside all guarantees {spare} bytes of the budget "
                f"of {budget_bytes} are left; a budget of {budget_bytes + stake.extra_bytes - spare} bytes or more, or "
                "lower guarantees fit"
            )


def choose_starts(stakes: Sequence[Stake], budget_bytes: int, room_bytes: int) -> frozenset[str]:
    """Ids of the engines whose starts fit beside all guarantees at once: those that have been granted theirs, then the
    others as they came. One that does not fit holds up those behind it, so that it is not passed over for ever."""
    spare = _spare(stakes, budget_bytes, room_bytes)
    chosen = set()
    for stake in sorted(stakes, key=lambda stake: (not stake.granted, stake.registered_ns)):
        if stake.extra_bytes > spare:
            break
        spare -= stake.extra_bytes
        chosen.add(stake.engine_id)
    return frozenset(chosen)


def _spare(stakes: Sequence[Stake], budget_bytes: int, room_bytes: int) -> int:
    """Whole units of the budget that nothing is promised to; below 0 where too much is."""
    left = budget_bytes - excess_bytes(sum(stake.weights_bytes for stake in stakes), room_bytes)
    return left // LIMIT_UNIT_BYTES * LIMIT_UNIT_BYTES - sum(_whole(stake.guarantee_bytes) for stake in stakes)


def _whole(value_bytes: int) -> int:
    return -(-value_bytes // LIMIT_UNIT_BYTES) * LIMIT_UNIT_BYTES
