"""The controller's wish for one replica: bounds inside which the replica runs its own loop."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ReplicaTarget:
    """Bounds for one replica. A newer revision replaces an older one; the same one again changes nothing.

    Attributes:
        revision: grows with every change, and from one life of the controller to the next.
        token_budget_max: most tokens a step may schedule; 0 leaves the engine's own setting.
        active_max: most requests that may run at once; 0 leaves the engine's own setting.
    """

    revision: int
    token_budget_max: int = 0
    active_max: int = 0
