"""Whether a KV block is moved or computed again: the cheaper of the two, by what both were seen to cost.

    loading pays    load seconds of a block                   < prefill seconds of its tokens
    storing pays    store seconds + load seconds of a block   < prefill seconds of its tokens

A block that is partly filled costs as much to move as a full one and less to compute.

While a cost is unknown a few blocks are moved to learn it; while moving does not pay a few are moved now and then,
because nothing else would show that the machine, or the prompts, have changed. Pure: observations and ``now`` in,
numbers of blocks out.
"""

from dataclasses import dataclass
from enum import StrEnum

MEMORY = 0.8
"""What is left of an older observation's weight when a new one arrives: about the last five count."""
ENOUGH = 3
"""Observations before a rate is believed."""
OFF_ABOVE = 1.0
"""Moving is switched off when it costs more than this part of computing again."""
ON_BELOW = 0.8
"""Moving is switched on again below this part."""
PROBE_BLOCKS = 8
"""Blocks of a probe: what may be moved without knowing that it pays."""
LEARN_EVERY_S = 1.0
"""Seconds from probe to probe while a cost is unknown."""
PROBE_EVERY_S = 30.0
"""Seconds from probe to probe while moving does not pay."""


class Move(StrEnum):
    """Between the device and the host buffer."""

    STORE = "store"
    LOAD = "load"


class Rate:
    """Units a second: recent units over recent seconds, so that a long observation counts for more than a short one."""

    def __init__(self) -> None:
        self.count = 0
        self._units = 0.0
        self._seconds = 0.0

    def observe(self, units: float, seconds: float) -> None:
        """Add one observation; one without units or without time says nothing and is passed over."""
        if units <= 0 or seconds <= 0:
            return
        self.count += 1
        self._units = MEMORY * self._units + units
        self._seconds = MEMORY * self._seconds + seconds

    @property
    def per_s(self) -> float | None:
        """The rate; None until there are ENOUGH observations."""
        return self._units / self._seconds if self.count >= ENOUGH else None


@dataclass
class Decisions:
    """Blocks, by what was decided about them: moved because it pays, moved to find out, or left."""

    moved: int = 0
    probed: int = 0
    declined: int = 0


@dataclass
class _Gate:
    """One kind of move. ``paying``: None while unknown. ``probe_left``: blocks of the probe that began at
    ``probe_at``."""

    paying: bool | None = None
    probe_at: float | None = None
    probe_left: int = 0


class BreakEven:
    """Decides for blocks of one size. Used by one thread.

    Args:
        block_bytes: bytes of a KV block, over all layers of one rank.
        block_tokens: tokens of a KV block.
    """

    def __init__(self, block_bytes: int, block_tokens: int) -> None:
        self._block_bytes = block_bytes
        self._block_tokens = block_tokens
        self._rates = {Move.STORE: Rate(), Move.LOAD: Rate()}
        self._prefill = Rate()
        self._gates = {Move.STORE: _Gate(), Move.LOAD: _Gate()}
        self.decisions = {Move.STORE: Decisions(), Move.LOAD: Decisions()}

    def observe_move(self, move: Move, moved_bytes: int, seconds: float) -> None:
        """A copy of this many bytes took so long, from its start to its end."""
        self._rates[move].observe(moved_bytes, seconds)

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """A step computed this many prompt tokens; pass steps that were nearly all prefill."""
        self._prefill.observe(tokens, seconds)

    def cost_ratio(self, move: Move) -> float | None:
        """Seconds of moving a block over seconds of computing its tokens; None while either is unknown.

        A store is charged with the load that it is made for, once loads are known.
        """
        prefill, move_s = self._prefill.per_s, self._block_s(move)
        if prefill is None or move_s is None:
            return None
        load_s = self._block_s(Move.LOAD) or 0.0
        return (move_s + (load_s if move is Move.STORE else 0.0)) * prefill / self._block_tokens

    def grant(self, move: Move, blocks: int, now: float, tokens: int | None = None) -> int:
        """How many of ``blocks`` to move now: all where it pays, otherwise what is left of a probe.

        Args:
            now: monotonic seconds, never less than before.
            tokens: of each of them, where they are not full.
        """
        gate, decisions, ratio = self._gates[move], self.decisions[move], self.cost_ratio(move)
        gate.paying = _pays(gate.paying, ratio)
        if gate.paying and ratio is not None:
            filled = 1.0 if tokens is None else tokens / self._block_tokens
            granted = blocks if ratio < OFF_ABOVE * filled else 0
            decisions.moved += granted
            decisions.declined += blocks - granted
            return granted
        every_s = LEARN_EVERY_S if gate.paying is None else PROBE_EVERY_S
        if gate.probe_at is None or now - gate.probe_at >= every_s:
            gate.probe_at, gate.probe_left = now, PROBE_BLOCKS
        granted = min(blocks, gate.probe_left)
        gate.probe_left -= granted
        decisions.probed += granted
        decisions.declined += blocks - granted
        return granted

    def _block_s(self, move: Move) -> float | None:
        rate = self._rates[move].per_s
        return None if rate is None else self._block_bytes / rate


def _pays(before: bool | None, ratio: float | None) -> bool | None:
    """With hysteresis: what was off comes on again only well below the break-even."""
    if ratio is None:
        return None
    return ratio < (ON_BELOW if before is False else OFF_ABOVE)
