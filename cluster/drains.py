"""Replicas that drain: which ones a name means, and what is left there."""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.core_client import ClusterCore
from memory_agent.reports import replica_name
from replicas.replica import ReplicaStats


@dataclass(frozen=True)
class Drain:
    """A replica that is to be empty.

    Attributes:
        streams: requests that it has still, of all ingress processes, a second ago at most.
        stays: why a request of this ingress process cannot leave and is let to its end, by its id.
    """

    replica: str
    model: str
    node_id: str
    node_ip: str
    streams: int
    stays: dict[str, str]


def drains(cores: Sequence[ClusterCore]) -> list[Drain]:
    """Of all models of this process."""
    return [
        Drain(one.engine_id, core.model, one.node_id, one.node_ip, one.streams, core.stays_at(one.engine_id))
        for core in cores
        for one in core.replicas
        if one.draining
    ]


def find(target: str, cores: Sequence[ClusterCore]) -> dict[ClusterCore, list[str]]:
    """The replicas that ``target`` means, by their model's core: the id of a replica or its end after the last "#", as
    `ellm status` shows it; the id of a node, its first eight characters or more, or its address. Empty for none."""
    found = {core: [one.engine_id for one in core.replicas if _is(one, target)] for core in cores}
    return {core: ids for core, ids in found.items() if ids}


def _is(replica: ReplicaStats, target: str) -> bool:
    named = target in (replica.engine_id, replica_name(replica.engine_id), replica.node_ip)
    return named or (len(target) >= 8 and replica.node_id.startswith(target))
