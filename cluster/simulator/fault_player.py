"""Makes faults happen to simulated replicas, and takes them back."""

from collections.abc import Callable, Sequence

from cluster.simulator.faults import OF_A_REPLICA, Fault, FaultKind
from cluster.simulator.sim_replica import SimReplica


class FaultPlayer:
    """Args:
    per_node: replicas on a node, in the order of their numbers.
    dies: called with a replica's number and the time when its engine dies.
    heals: called with the time when the network has come back to a node.
    """

    def __init__(
        self,
        replicas: Sequence[SimReplica],
        per_node: int,
        dies: Callable[[int, float], None],
        heals: Callable[[float], None],
    ) -> None:
        self._replicas, self._per_node = replicas, per_node
        self._dies, self._heals = dies, heals

    def begin(self, fault: Fault, now_s: float) -> None:
        """The fault is there."""
        for row in self._rows(fault):
            if fault.kind in (FaultKind.REPLICA, FaultKind.NODE):
                self._dies(row, now_s)
            else:
                self._set(self._replicas[row], fault, True)

    def end(self, fault: Fault, now_s: float) -> None:
        """The fault is over."""
        for row in self._rows(fault):
            if fault.kind in (FaultKind.REPLICA, FaultKind.NODE):
                self._replicas[row].restart()
            else:
                self._set(self._replicas[row], fault, False)
        if fault.kind is FaultKind.PARTITION:
            self._heals(now_s)

    def _rows(self, fault: Fault) -> Sequence[int]:
        if fault.kind in OF_A_REPLICA:
            return (fault.target,)
        first = fault.target * self._per_node
        return range(first, min(first + self._per_node, len(self._replicas)))

    @staticmethod
    def _set(replica: SimReplica, fault: Fault, broken: bool) -> None:
        match fault.kind:
            case FaultKind.SLOW:
                replica.engine.slowness = fault.factor if broken else 1.0
            case FaultKind.AGENT:
                replica.reporting = not broken
            case FaultKind.PARTITION:
                replica.reachable = not broken
            case _:
                replica.frozen = broken
