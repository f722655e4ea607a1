"""What is simulated: the cluster, its policies and its faults."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from cluster.bench.errors import BenchError
from cluster.config import SloClass
from cluster.simulator.faults import Fault
from replicas.engine_profile import EngineProfile


@dataclass(frozen=True)
class Scenario:
    """A cluster of one model.

    Attributes:
        policy: name of a routing policy; see ``cluster.routing_policy``.
        routers: that each see a part of the requests and the same reports.
        per_node: replicas on a node, each on a device of its own.
        classes: of requests; the first is that of a request which names none.
        report_every_s: period of the agents' reports.
        timeout_s: after which a router gives up a replica that does not answer; retries: other replicas that it tries
            for a request that has no token yet.
        admission: requests wait in the ingress, in order of classes and deadlines, instead of in the engines.
        batch_sizing: the controller sets targets by TPOT; migration: it has requests move; scaling: it starts and
            drains replicas, from ``replicas`` up to ``replicas_most``, which take ``start_s`` to start.
        sample_every_s: period of the curve of memory by owner.
    """

    profile: EngineProfile
    replicas: int
    policy: str = "predicted"
    routers: int = 1
    per_node: int = 8
    classes: Sequence[SloClass] = field(default_factory=lambda: [SloClass()])
    faults: Sequence[Fault] = ()
    seed: int = 0
    report_every_s: float = 0.25
    timeout_s: float = 2.0
    retries: int = 2
    admission: bool = False
    batch_sizing: bool = False
    migration: bool = False
    scaling: bool = False
    replicas_most: int = 0
    start_s: float = 60.0
    sample_every_s: float = 1.0

    def __post_init__(self) -> None:
        for option, value, least in (
            ("--replicas", self.replicas, 1),
            ("--routers", self.routers, 1),
            ("--per-node", self.per_node, 1),
            ("--seed", self.seed, 0),
            ("--retries", self.retries, 0),
        ):
            if value < least:
                raise BenchError(f"{option} {value} is too small: give at least {least}")
        for option, period in (("--report-every", self.report_every_s), ("--sample-every", self.sample_every_s)):
            if not 0.01 <= period <= 3600:
                raise BenchError(f"{option} {period:g} does not fit: give seconds from 0.01 to 3600")
        if self.scaling and self.replicas_most < self.replicas:
            raise BenchError(
                f"--max-replicas {self.replicas_most} is less than --replicas {self.replicas}: scaling needs room"
            )

    @property
    def nodes(self) -> int:
        return -(-max(self.replicas, self.replicas_most) // self.per_node)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; the profile by name and source."""
        return {
            "profile": self.profile.name,
            "elastic": self.profile.elastic,
            "max_num_batched_tokens": self.profile.max_num_batched_tokens,
            "host_buffer_bytes": self.profile.host.bytes,
            "replicas": self.replicas,
            "replicas_most": self.replicas_most,
            "policy": self.policy,
            "routers": self.routers,
            "per_node": self.per_node,
            "classes": [one.model_dump() for one in self.classes],
            "faults": [msgspec.to_builtins(one) for one in self.faults],
            "seed": self.seed,
            "report_every_s": self.report_every_s,
            "timeout_s": self.timeout_s,
            "retries": self.retries,
            "admission": self.admission,
            "batch_sizing": self.batch_sizing,
            "migration": self.migration,
            "scaling": self.scaling,
        }


Progress = Callable[[int, int], None]
"""Told how many of how many requests have ended."""
