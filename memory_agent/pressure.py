"""How short of memory an engine or a device is: levels with hysteresis. Pure: state and sample in, state out."""

from dataclasses import dataclass

from memory_agent.reports import PressureLevel

RISE_AT = {PressureLevel.ELEVATED: 0.85, PressureLevel.CRITICAL: 0.97}
"""Usage ratio (wanted bytes over obtainable bytes) from which a level applies."""
RELEASE_GAP = 0.05
"""A level is left only when the ratio has fallen this far below its threshold."""


@dataclass(frozen=True)
class Pressure:
    """A level and the sample before.

    A level rises only when two samples in a row agree: where bytes are free, demand that grows past a limit is followed
    by a raise of the limit a moment later, and that moment is no shortage.
    """

    level: PressureLevel = PressureLevel.NORMAL
    last_ratio: float = 0.0

    def sampled(self, ratio: float) -> "Pressure":
        """The state after one more sample. ratio: 0 upwards; above 1 more is wanted than can be had."""
        confirmed = min(ratio, self.last_ratio)
        risen = _highest(confirmed, 0.0)
        held = min(self.level, _highest(ratio, RELEASE_GAP))
        return Pressure(max(risen, held), ratio)


def usage_ratio(wanted_bytes: int, obtainable_bytes: int) -> float:
    """wanted / obtainable, 0 when nothing is wanted, infinite when something is wanted of nothing."""
    if wanted_bytes == 0:
        return 0.0
    return wanted_bytes / obtainable_bytes if obtainable_bytes else float("inf")


def _highest(ratio: float, gap: float) -> PressureLevel:
    return max((level for level, at in RISE_AT.items() if ratio >= at - gap), default=PressureLevel.NORMAL)
