"""An engine's demand, smoothed in one direction: a rise counts at once, a fall only after it has lasted.

Short prompts make demand jump up and down many times a second; leases that followed would wake engines for nothing.
"""

from dataclasses import dataclass, replace

HOLD_S = 0.25
"""A fall of demand counts after HOLD_S to 2 * HOLD_S, where no other time is given."""


@dataclass(frozen=True)
class DemandPeak:
    """Highest demand over a sliding window, kept in two buckets. Pure: ``observed`` returns the next state."""

    current_bytes: int = 0
    previous_bytes: int = 0
    bucket_began_s: float = 0.0
    hold_s: float = HOLD_S

    @property
    def demand_bytes(self) -> int:
        return max(self.current_bytes, self.previous_bytes)

    def observed(self, demand_bytes: int, now_s: float) -> "DemandPeak":
        """The state after a sample at ``now_s`` (monotonic seconds)."""
        age_s = now_s - self.bucket_began_s
        if age_s < self.hold_s:
            return replace(self, current_bytes=max(self.current_bytes, demand_bytes))
        previous = self.current_bytes if age_s < 2 * self.hold_s else demand_bytes
        return replace(self, current_bytes=demand_bytes, previous_bytes=previous, bucket_began_s=now_s)
