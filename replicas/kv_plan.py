"""How many extents to map or unmap in a step. Pure: numbers in, numbers out."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class KvState:
    """Extents by state, and what is wanted, at the start of a step.

    Attributes:
        limit: extents the lease allows; ``committed`` may exceed it only while a shrink is under way.
        soft_limit: extents beside the activations of the coming step, at most ``limit``: free blocks make room for
            them, blocks in use do not.
        mapped, mapping, unmapping: extents usable now; asked for; being given back.
        wanted: extents that running and waiting requests and the reserve could use.
        rest: extents an idle engine keeps.
        idle: the engine has had nothing to do for long enough to give memory back.
        batch: most extents to map in one step, so that committing memory does not hold up the running decodes.
    """

    limit: int
    soft_limit: int
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
    """Extents to map and to unmap; of the latter ``forced`` must go even where their blocks are in use."""

    grow: int = 0
    shrink: int = 0
    forced: int = 0


def plan_moves(state: KvState) -> KvPlan:
    """Obey the lease first, then demand, then idleness. Never plans to grow beyond ``soft_limit``."""
    held = state.mapped + state.mapping
    if held > state.soft_limit:
        return KvPlan(shrink=held - state.soft_limit, forced=max(0, held - state.limit))
    if state.idle and state.mapping == 0 and state.mapped > state.rest:
        return KvPlan(shrink=state.mapped - state.rest)
    missing = state.wanted - held
    room = state.soft_limit - state.committed
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


def blocks_within(groups: Sequence[KvGroup], tokens: int, rows: int) -> int:
    """The most new KV blocks that a step of ``tokens`` of ``rows`` requests takes: each request may begin one more than
    its tokens fill."""
    return sum(rows + -(-tokens // group.block_tokens) for group in groups)


def blocks_ahead(groups: Sequence[KvGroup], tokens: int, computed_tokens: int, lookahead_tokens: int) -> int:
    """KV blocks a request needs beyond those that hold its computed tokens: its rest of prefill, or the next block of
    its decode when that is at most ``lookahead_tokens`` away; in each group."""
    ahead = 0
    for group in groups:
        needed = -(-(tokens + lookahead_tokens) // group.block_tokens)
        held = -(-computed_tokens // group.block_tokens)
        ahead += min(max(0, needed - held), group.most_blocks)
    return ahead
