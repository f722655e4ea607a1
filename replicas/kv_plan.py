"""How many extents to map or unmap in a step. Pure: numbers in, numbers out."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class KvState:
    """Extents by state, and what is wanted, at the start of a step.

    Attributes:
        limit: extents the lease allows; ``committed`` may exceed it only while a shrink is under way.
        mapped, mapping, unmapping: extents usable now; asked for; being given back.
        wanted: extents that running and waiting requests and the reserve could use.
        rest: extents an idle engine keeps.
        idle: the engine has had nothing to do for long enough to give memory back.
        batch: most extents to map in one step, so that committing memory does not hold up the running decodes.
    """

    limit: int
    mapped: int
    mapping: int
    unmapping: int
    wanted: int
    rest: int
    idle: bool
    batch: int

    @property
    def committed(self) -> int:
        return self.mapped + self.mapping + self.unmapping


@dataclass(frozen=True)
class KvPlan:
    """Extents to map and to unmap; ``forced`` when the lease demands it, so that even used blocks must go."""

    grow: int = 0
    shrink: int = 0
    forced: bool = False


def plan_moves(state: KvState) -> KvPlan:
    """Obey the lease first, then demand, then idleness. Never plans to hold more than ``limit``."""
    excess = state.mapped + state.mapping - state.limit
    if excess > 0:
        return KvPlan(shrink=excess, forced=True)
    if state.idle and state.mapping == 0 and state.mapped > state.rest:
        return KvPlan(shrink=state.mapped - state.rest)
    missing = state.wanted - state.mapped - state.mapping
    room = state.limit - state.committed
    grow = min(missing, room, state.batch)
    return KvPlan(grow=grow) if grow > 0 else KvPlan()


@dataclass(frozen=True)
class KvGroup:
    """Layers of a model that share a table of KV blocks.

    Attributes:
        block_tokens: tokens of a KV block of this group.
        most_blocks: most blocks that one request references at once: few where the layers look back a window only.
    """

    block_tokens: int
    most_blocks: int


def blocks_ahead(groups: Sequence[KvGroup], tokens: int, computed_tokens: int, lookahead_tokens: int) -> int:
    """KV blocks a request needs beyond those that hold its computed tokens: its rest of prefill, or the next block of
    its decode when that is at most ``lookahead_tokens`` away; in each group."""
    ahead = 0
    for group in groups:
        needed = -(-(tokens + lookahead_tokens) // group.block_tokens)
        held = -(-computed_tokens // group.block_tokens)
        ahead += min(max(0, needed - held), group.most_blocks)
    return ahead
