"""Whose the memory of a simulated cluster is, at one moment."""

from collections.abc import Iterable
from dataclasses import dataclass

from cluster.simulator.sim_replica import SimReplica
from replicas.engine_profile import EngineProfile


@dataclass(frozen=True, slots=True)
class MemorySample:
    """All replicas that are up.

    Attributes:
        activation_bytes: of the steps under way; of static engines what is set aside for the largest.
        device_bytes: for KV memory and activations.
    """

    at_s: float
    weights_bytes: int
    kv_used_bytes: int
    kv_cached_bytes: int
    activation_bytes: int
    device_bytes: int
    running: int
    waiting: int
    replicas: int


def sample_memory(replicas: Iterable[SimReplica], profile: EngineProfile, now_s: float) -> MemorySample:
    """Sums over the replicas that are up, all of this profile."""
    seen = [replica.engine.counts() for replica in replicas if replica.up]
    memory = profile.memory
    set_aside = memory.activation_bytes(profile.max_num_batched_tokens)
    return MemorySample(
        at_s=now_s,
        weights_bytes=len(seen) * profile.weights_bytes,
        kv_used_bytes=sum(one.used_blocks for one in seen) * memory.block_bytes,
        kv_cached_bytes=sum(one.cached_blocks for one in seen) * memory.block_bytes,
        activation_bytes=sum(one.activation_bytes for one in seen) if profile.elastic else len(seen) * set_aside,
        device_bytes=len(seen) * profile.device_bytes,
        running=sum(one.running for one in seen),
        waiting=sum(one.waiting for one in seen),
        replicas=len(seen),
    )
