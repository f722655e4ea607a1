"""How many extents to map or unmap in a step. Pure: numbers in, numbers out."""

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


def blocks_ahead(tokens: int, computed_tokens: int, block_tokens: int, lookahead_tokens: int) -> int:
    """KV blocks a request needs beyond those that hold its computed tokens: its rest of prefill, or the next block of
    its decode when that is at most ``lookahead_tokens`` away."""
    needed = -(-(tokens + lookahead_tokens) // block_tokens)
    held = -(-computed_tokens // block_tokens)
    return max(0, needed - held)
