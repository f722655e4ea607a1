"""Faults of a simulated cluster, on a schedule.

kind        what happens from ``at_s`` for ``lasts_s``
replica     the engine is dead; then it starts anew, its caches cold
node        all engines of a node are
agent       the node sends no reports; its engines go on
partition   nothing reaches the node, and nothing comes back: reports, requests, tokens
stale       the node's reports repeat the numbers that it had
slow        an engine's steps take ``factor`` times as long
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from cluster.bench.errors import BenchError

_WRITTEN = re.compile(r"([a-z]+):(\d+)@(\d+(?:\.\d+)?)\+(\d+(?:\.\d+)?)(?:x(\d+(?:\.\d+)?))?")


class FaultKind(StrEnum):
    """What breaks."""

    REPLICA = "replica"
    NODE = "node"
    AGENT = "agent"
    PARTITION = "partition"
    STALE = "stale"
    SLOW = "slow"


OF_A_REPLICA = frozenset({FaultKind.REPLICA, FaultKind.SLOW})
"""These have a replica's number as their target, the others a node's."""


@dataclass(frozen=True)
class Fault:
    """One fault. ``target``: number of a replica or a node, from 0."""

    kind: FaultKind
    target: int
    at_s: float
    lasts_s: float
    factor: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Fault":
        """From ``replica:3@10+20``: of replica 3, at 10 s, for 20 s; with a factor, ``slow:3@10+20x4``. Raises
        BenchError."""
        match = _WRITTEN.fullmatch(text.strip())
        if match is None or match[1] not in set(FaultKind) or (match[5] is not None) != (match[1] == FaultKind.SLOW):
            raise BenchError(
                f"--fault {text!r} does not fit: give KIND:NUMBER@SECONDS+SECONDS with one of {', '.join(FaultKind)}, "
                "such as replica:3@10+20, and slow with a factor, such as slow:3@10+20x4"
            )
        return cls(FaultKind(match[1]), int(match[2]), float(match[3]), float(match[4]), float(match[5] or 1.0))


def check_faults(faults: Iterable[Fault], replicas: int, nodes: int) -> None:
    """Raises BenchError for a target that does not exist."""
    for fault in faults:
        what, count = ("replicas", replicas) if fault.kind in OF_A_REPLICA else ("nodes", nodes)
        if fault.target >= count:
            raise BenchError(f"--fault {fault.kind}:{fault.target} does not fit: there are {count} {what}, from 0")
