"""The KV connector through which vLLM's KV cache becomes elastic. One instance in the scheduler, one in each worker.

Through vLLM's connector interface it provides the memory under the KV tensor (worker, ``get_mem_pool_context``), parks
the blocks that have no memory (scheduler, after the handshake), and carries moves and acknowledgements between both.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import KVConnectorOutput

from memory_agent.extents import ExtentMap, KvGeometry
from memory_agent.heap import trim_heap
from memory_agent.host_segment import HostSegment, host_segment_path
from memory_agent.kv_fingerprint import KvFingerprint
from memory_agent.lease_board import NO_FD, EngineWord
from memory_agent.staging import staging_origin
from replicas.activation_ledger import ActivationSample
from replicas.activation_meter import ActivationMeter
from replicas.cuda_meter import CudaMeter
from replicas.elastic_kv import ElasticKv
from replicas.elastic_prefill import ElasticPrefill, Objectives
from replicas.elastic_settings import ElasticSettings
from replicas.host_copies import HostCopies
from replicas.host_kv import HostKv
from replicas.host_traffic import HostTraffic
from replicas.kv_arrivals import KvArrivals
from replicas.kv_device import CudaDevice, worker_device
from replicas.kv_geometry import check_extents, kv_geometry, kv_groups
from replicas.kv_memory import KvMemory
from replicas.kv_moves import KvAck, KvAcks, KvHandshake, KvMoves
from replicas.kv_push import KvPush
from replicas.kv_transport import SharedMemoryTransport
from replicas.migration import Migration
from replicas.migration_copies import MigrationCopies
from replicas.step_meter import StepMeter

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

_STAGING_BYTES = 128 << 20
"""Of each worker, while a request leaves."""
_STAGED_A_STEP_BYTES = 16 << 20
"""Copied in one step at most, so that the requests that stay go on."""


class ElasticKVConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module. With a host buffer, KV blocks that leave the device come back through it too."""

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        assert vllm_config.kv_transfer_config is not None
        self.settings = ElasticSettings.from_extra_config(vllm_config.kv_transfer_config.kv_connector_extra_config)
        self.geometry = kv_geometry(kv_cache_config)
        self.groups = kv_groups(vllm_config, kv_cache_config)
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        # With a sliding window a request's first blocks are not its own any more.
        self._migrates = len(specs) == 1 and isinstance(specs[0], FullAttentionSpec)
        self._memory: KvMemory | None = None
        self._kv: ElasticKv | None = None
        self._begun: KvMoves | None = None
        self._acks: list[KvAck] = []
        self._samples: list[ActivationSample] = []
        self._host_slots = self._slots()
        self._fingerprint = partial(_fingerprint, vllm_config, self.geometry, self.settings.weights_identity)
        self.host: HostKv | None = None
        self.prefill: ElasticPrefill | None = None
        self._copies: HostCopies | None = None
        self.migration: Migration | None = None
        self._migration_copies: MigrationCopies | None = None

    @property
    def requires_kv_delivery(self) -> bool:
        # Nothing is handed to another engine: a preempted request's tokens in flight are delivered, not dropped.
        return False

    # -- worker -------------------------------------------------------------------------------------------------------

    def get_mem_pool_context(self) -> AbstractContextManager[Any]:
        self._memory = KvMemory(self.geometry, self.settings.rest_bytes, worker_device())
        return self._memory.allocation()

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: "VllmConfig") -> str | None:
        """A block over all layers in one piece, where chunks are as large as a GPU's: so extents are small. Where the
        attention kernels cannot, vLLM takes another one."""
        return "BLHNC" if current_platform.is_cuda() else None

    def end_warm_up(self) -> None:
        """vLLM has warmed up its kernels; the first step is still to come."""
        self._worker_memory.end_warm_up()

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata:
        """The last that vLLM asks of a worker before the engine is live and follows its lease. What loading has left on
        the heap goes back by then: the lease was for the start."""
        memory = self._worker_memory
        memory.require_adopted()
        trim_heap()
        if self._host_slots and self._copies is None:
            self._copies = HostCopies(self._make_segment(), memory.blocks)
        if self._migrates and self._migration_copies is None:
            rank = get_tensor_model_parallel_rank()
            self._migration_copies = MigrationCopies(self._transport(rank), memory.blocks)
        return KvHandshake(
            pid=os.getpid(), memory_fd=memory.fd, chunk_bytes=memory.chunk_bytes, mapped_extents=sorted(memory.mapped)
        )

    def begin_step(self, moves: KvMoves) -> None:
        """Settle the step before, and move memory. The blocks to unmap are out of use since this step was scheduled,
        and earlier steps have finished, because a worker runs its steps in order; a GPU has them waited for."""
        self._begun = moves
        self._samples = self.activations.finish_step(moves.keep_bytes)
        self.activations.make_room(moves.tokens, moves.rows, moves.step_bytes)
        if moves.rest:
            self.activations.rest()
        if self._copies is not None:
            self._copies.store(moves.host)
        if self._migration_copies is not None:
            self._migration_copies.store(moves.migration)
        self._acks = [self._worker_memory.apply(moves)] if moves.sequence else []

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Runs in every step before the forward. On a GPU the worker has begun the step already: vLLM's newer model
        runner copies and clears blocks before it comes here, which must not be seen by what is stored."""
        assert isinstance(kv_connector_metadata, KvMoves)
        moves = kv_connector_metadata
        if self._begun is not moves:
            self.begin_step(moves)
        self._begun = None
        if self._migration_copies is not None:
            self._migration_copies.load(moves.migration)
        if self._copies is not None:
            self._copies.load(moves.host)
            self._copies.start_forward(moves.tokens, moves.rows)
        self.activations.start_step(moves.tokens, moves.rows)

    def build_connector_worker_meta(self) -> KvAcks | None:
        report = self._copies.finish() if self._copies is not None else None
        moved = self._migration_copies.finish() if self._migration_copies is not None else None
        answer = KvAcks(
            self._acks,
            self._samples,
            [report] if report is not None else [],
            [moved] if moved is not None else [],
        )
        self._acks, self._samples = [], []
        return answer if answer.acks or answer.activations or answer.host or answer.migration else None

    def get_block_ids_with_load_errors(self) -> set[int]:
        copies = (self._copies, self._migration_copies)
        return set().union(*(one.take_invalid_blocks() for one in copies if one is not None))

    def shutdown(self) -> None:
        if self._copies is not None:
            self._copies.close()
        if self._migration_copies is not None:
            self._migration_copies.close()

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        """Loaded before the forward, with the step's moves."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loaded before the forward, with the step's moves."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Stored when a block leaves the device, not when it is computed."""

    def wait_for_save(self) -> None:
        """Stored when a block leaves the device, not when it is computed."""

    # -- scheduler ----------------------------------------------------------------------------------------------------

    @property
    def kv(self) -> ElasticKv:
        """The scheduler's state machine; there from the handshake on, which precedes the first step."""
        if self._kv is None:
            raise RuntimeError("the KV handshake has not happened: no worker has built its KV tensor")
        return self._kv

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        assert self._kv_cache_manager is not None
        handshakes = [h for _, h in sorted(metadata.items()) if isinstance(h, KvHandshake)]
        if handshakes[0].memory_fd == NO_FD:  # a GPU's chunks are large, so extents are more than their blocks
            extents = ExtentMap(self.geometry, handshakes[0].chunk_bytes)
            check_extents(self.groups, extents, len(handshakes), self.settings.kv_guarantee_bytes)
        pool = self._kv_cache_manager.block_pool
        if self._host_slots:
            block_tokens = self.groups[0].block_tokens
            traffic = HostTraffic(self._host_slots, self.geometry.block_bytes, block_tokens, len(handshakes))
            self.host = HostKv(pool, block_tokens, traffic, self._fingerprint(rank=0).digest)
            if self.settings.ttft_slo_s and self.settings.tpot_slo_s:
                longest = self.settings.kv_guarantee_bytes // (self.geometry.block_bytes * len(handshakes))
                objectives = Objectives(self.settings.ttft_slo_s, self.settings.tpot_slo_s)
                self.prefill = ElasticPrefill(objectives, max(1, longest), self._host_slots)
        if self._migrates:
            self.migration = self._make_migration(pool, len(handshakes))
        on_evict = self.host.tier.evict if self.host is not None else None
        self._kv = ElasticKv(self.settings, self.geometry, self.groups, pool, handshakes, on_evict)
        limits = self._vllm_config.scheduler_config
        self._kv.row.set(EngineWord.MAX_NUM_SEQS, limits.max_num_seqs)
        self._kv.row.set(EngineWord.MAX_NUM_BATCHED_TOKENS, limits.max_num_batched_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        moves = self.kv.take_moves(
            scheduler_output.total_num_scheduled_tokens, len(scheduler_output.num_scheduled_tokens)
        )
        if self.host is not None:
            moves.host = self.host.take()
            self.host.publish(self.kv.row)
        if self.migration is not None:
            moves.migration = self.migration.take()
        return moves

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        acks = connector_output.kv_connector_worker_meta
        if isinstance(acks, KvAcks):
            self.kv.on_acks(acks.acks)
            self.kv.on_activations(acks.activations)
            if self.host is not None:
                self.host.on_reports(acks.host)
            if self.migration is not None:
                self.migration.on_reports(acks.migration)

    def has_pending_block_frees(self) -> bool:
        return self.kv.waiting_helps()

    def has_pending_push_work(self) -> bool:
        return self._kv is not None and (
            self._kv.has_work()
            or (self.host is not None and self.host.traffic.busy)
            or (self.migration is not None and self.migration.busy)
        )

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        if self.migration is not None and (found := self.migration.arrivals.match(request, num_computed_tokens)) != 0:
            return found, False
        if self.host is None:
            return 0, False
        if self.prefill is not None and self.prefill.holds(request.request_id, new=not request.num_output_tokens):
            return None, False  # vLLM leaves it out of this step
        return self.host.match(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        block_ids = blocks.get_block_ids()[0]
        if self.migration is not None and self.migration.arrivals.allocate(request, block_ids, num_external_tokens):
            num_external_tokens = 0
        if self.host is not None:
            self.host.allocate(request, block_ids, num_external_tokens)

    def preempt(self, request: "Request") -> None:
        """Called by our schedulers when vLLM is about to take a running request's blocks."""
        assert self._kv_cache_manager is not None
        blocks = self._kv_cache_manager.get_blocks(request.request_id).blocks[0]
        if self.host is not None:
            self.host.preempt(request, blocks)
        if self.migration is not None:
            doubts = self.migration.arrivals.doubts
            doubts.lose(request.request_id, [block.block_id for block in blocks])

    def fail(self, invalid_block_ids: set[int], running: Mapping[str, Sequence[int]]) -> list[str]:
        """These device blocks could not be loaded: see ``LoadDoubts.fail``."""
        wrong = []
        if self.host is not None:
            wrong += self.host.fail(invalid_block_ids, running)
        if self.migration is not None:
            wrong += self.migration.arrivals.doubts.fail(invalid_block_ids, running)
        return list(dict.fromkeys(wrong))

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self.host is not None:
            self.host.finish(request.request_id, block_ids[0])
        if self.migration is not None:
            self.migration.arrivals.finish(request, block_ids[0])
        if self.prefill is not None:
            self.prefill.forget(request.request_id)
        return False, None

    def reset_cache(self) -> bool | None:
        if self.host is not None:
            self.host.clear()
        if self.migration is not None:
            self.migration.clear()
        return True

    # -- both ---------------------------------------------------------------------------------------------------------

    def _slots(self) -> int:
        """Slots of each worker's part of the host buffer; 0 for none."""
        slots = self.settings.host_buffer_bytes // self.geometry.block_bytes
        if slots and len(self.groups) > 1:
            logger.warning("no host buffer: it takes models of one KV cache group, this one has %d", len(self.groups))
            return 0
        return slots

    def _transport(self, rank: int) -> SharedMemoryTransport:
        base = staging_origin(Path(self.settings.board_path), self.settings.row)
        fingerprint = self._fingerprint(rank=rank).digest
        return SharedMemoryTransport(base, self.geometry.block_bytes, self._staging_places, rank, fingerprint)

    @property
    def _staging_places(self) -> int:
        return max(4, _STAGING_BYTES // self.geometry.block_bytes)

    def _make_migration(self, pool: "BlockPool", ranks: int) -> Migration:
        """The scheduler's side."""
        fingerprint, block_tokens = self._fingerprint(rank=0).digest, self.groups[0].block_tokens
        transport = self._transport(rank=0)
        at_once = max(1, _STAGED_A_STEP_BYTES // self.geometry.block_bytes)
        push = KvPush(block_tokens, self._staging_places, at_once, fingerprint, transport.origin)
        disbelieve = self.host.tier.disbelieve if self.host is not None else lambda ids: pool.evict_blocks(set(ids))
        return Migration(push, KvArrivals(pool, block_tokens, fingerprint, transport.arrived, disbelieve), ranks)

    def _make_segment(self) -> HostSegment:
        """This worker's part of the host buffer. A file that an engine before has left in the same row is removed."""
        rank = get_tensor_model_parallel_rank()
        path = host_segment_path(Path(self.settings.board_path), self.settings.row, rank)
        path.unlink(missing_ok=True)
        return HostSegment.create(path, self.geometry.block_bytes, self._host_slots, self._fingerprint(rank).digest)

    @cached_property
    def activations(self) -> StepMeter:
        """Of this worker."""
        memory, charged = self._worker_memory, self.settings.charge_activations
        if isinstance(memory.device, CudaDevice):
            return CudaMeter(memory.device.allocator(memory.pool) if charged else None, memory.pool)
        return ActivationMeter(charged)

    @property
    def _worker_memory(self) -> KvMemory:
        if self._memory is None:
            raise RuntimeError("vLLM did not ask for the KV memory context: this model's KV cache cannot be elastic")
        return self._memory


def _fingerprint(config: "VllmConfig", geometry: KvGeometry, weights: str, rank: int) -> KvFingerprint:
    return KvFingerprint(
        weights=weights,
        dtype=str(config.model_config.dtype),
        kv_dtype=str(config.cache_config.cache_dtype),
        block_tokens=config.cache_config.block_size,
        layout=repr([(region.layers, region.page_bytes) for region in geometry.regions]),
        tp_rank=rank,
        tp_size=config.parallel_config.tensor_parallel_size,
    )
