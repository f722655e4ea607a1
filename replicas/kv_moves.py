"""What scheduler and workers say to each other about KV memory, carried by vLLM's connector messages.

    scheduler --KvMoves--> every worker      with a step: unmap these extents, then map those, before the forward
    scheduler <--KvAcks--- every worker      with that step's output: who did what

A block of a mapping extent stays parked until every rank has acknowledged it; a rank that failed aborts it on all.
"""

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from replicas.activation_ledger import ActivationSample
from replicas.host_moves import HostReport, HostWork
from replicas.migration import MigrationReport, MigrationWork


@dataclass
class KvMoves(KVConnectorMetadata):
    """Extents to unmap and then to map. ``sequence`` is 0 for a step that neither moves any nor rests.

    ``rest`` gives the memory of past activations back; of what later steps free ``keep_bytes`` may stay. ``tokens`` and
    ``rows`` are those of the step, ``step_bytes`` what it is charged for on each worker. ``check``, where there is one,
    asks every worker to check its books after the move: so many extents must be mapped then. ``host``: copies to and
    from the host buffer; ``migration``: likewise of requests that leave or come.
    """

    sequence: int = 0
    unmap: list[int] = field(default_factory=list)
    map: list[int] = field(default_factory=list)
    rest: bool = False
    keep_bytes: int = 0
    tokens: int = 0
    rows: int = 0
    step_bytes: int = 0
    check: int | None = None
    host: HostWork = field(default_factory=HostWork)
    migration: MigrationWork = field(default_factory=MigrationWork)


@dataclass
class KvAck:
    """One worker's answer to one KvMoves.

    Without an error all of it is done. With one, nothing of ``map`` is mapped, and of ``unmap`` some may still be.
    ``unmap_s`` and ``map_s`` are what each took. ``imbalance`` is what a check of the worker's books found: a defect.
    """

    sequence: int
    error: str | None
    unmap_s: float
    map_s: float
    imbalance: str | None = None


@dataclass
class KvAcks(KVConnectorWorkerMetadata):
    """The answers of all workers to one step, and what the step before it took. ``host`` and ``migration``: as in
    KvMoves."""

    acks: list[KvAck]
    activations: list[ActivationSample]
    host: list[HostReport] = field(default_factory=list)
    migration: list[MigrationReport] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, KvAcks)
        return KvAcks(
            self.acks + other.acks,
            self.activations + other.activations,
            self.host + other.host,
            self.migration + other.migration,
        )


@dataclass
class KvHandshake(KVConnectorHandshakeMetadata):
    """What a worker reports once, when its KV tensor exists.

    Attributes:
        pid, memory_fd: the process, and the descriptor in it that backs the memory, or NO_FD.
        chunk_bytes: size of a physical chunk, from the backend's granularity and the model's KV geometry.
        mapped_extents: mapped from the start.
    """

    pid: int
    memory_fd: int
    chunk_bytes: int
    mapped_extents: list[int]
