"""The KV connector through which vLLM's KV cache becomes elastic. One instance in the scheduler, one in each worker.

Through vLLM's connector interface it provides the memory under the KV tensor (worker, ``get_mem_pool_context``), parks
the blocks that have no memory (scheduler, after the handshake), and carries moves and acknowledgements between both.
"""

import os
from contextlib import AbstractContextManager
from functools import cached_property
from math import ceil
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput

from replicas.activation_meter import ActivationMeter
from replicas.elastic_kv import ElasticKv
from replicas.elastic_settings import ElasticSettings
from replicas.kv_geometry import kv_geometry
from replicas.kv_memory import KvMemory
from replicas.kv_moves import KvAcks, KvHandshake, KvMoves

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request


class ElasticKVConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module. It never loads or saves KV of its own: every request misses here."""

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        assert vllm_config.kv_transfer_config is not None
        self.settings = ElasticSettings.from_extra_config(vllm_config.kv_transfer_config.kv_connector_extra_config)
        self._block_tokens = vllm_config.cache_config.block_size
        self._geometry = kv_geometry(kv_cache_config)
        self._memory: KvMemory | None = None
        self._kv: ElasticKv | None = None
        self._answer: KvAcks | None = None

    @property
    def requires_kv_delivery(self) -> bool:
        # Nothing is handed to another engine: a preempted request's tokens in flight are delivered, not dropped.
        return False

    # -- worker -------------------------------------------------------------------------------------------------------

    def get_mem_pool_context(self) -> AbstractContextManager[Any]:
        self._memory = KvMemory(self._geometry, self.settings.rest_bytes)
        return self._memory.allocation()

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata:
        memory = self._worker_memory
        memory.require_adopted()
        return KvHandshake(
            pid=os.getpid(), memory_fd=memory.fd, chunk_bytes=memory.chunk_bytes, mapped_extents=sorted(memory.mapped)
        )

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Runs in every step before the forward: the blocks to unmap are out of use since this step was scheduled, and
        earlier steps have finished, because a worker runs its steps in order."""
        assert isinstance(kv_connector_metadata, KvMoves)
        moves = kv_connector_metadata
        samples = self._activations.finish_step()
        if moves.trim:
            self._activations.trim()
        acks = [self._worker_memory.apply(moves)] if moves.sequence else []
        self._activations.start_step(moves.tokens, moves.rows, moves.keep)
        self._answer = KvAcks(acks, samples) if acks or samples else None

    def build_connector_worker_meta(self) -> KvAcks | None:
        answer, self._answer = self._answer, None
        return answer

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        """Nothing to load."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to load."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to save."""

    def wait_for_save(self) -> None:
        """Nothing to save."""

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
        self._kv = ElasticKv(
            self.settings, self._geometry, self._block_tokens, self._kv_cache_manager.block_pool, handshakes
        )
        assert self._kv_cache_config is not None
        held_at_once = get_max_concurrency_for_kv_cache_config(self._vllm_config, self._kv_cache_config)
        self._kv.require_guarantee(
            blocks=ceil(self._kv_cache_config.num_blocks / held_at_once),
            tokens=self._vllm_config.model_config.max_model_len,
        )

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self.kv.take_moves(
            scheduler_output.total_num_scheduled_tokens, len(scheduler_output.num_scheduled_tokens)
        )

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        acks = connector_output.kv_connector_worker_meta
        if isinstance(acks, KvAcks):
            self.kv.on_acks(acks.acks)
            self.kv.on_activations(acks.activations)

    def has_pending_block_frees(self) -> bool:
        return self.kv.waiting_helps()

    def has_pending_push_work(self) -> bool:
        return self._kv is not None and self._kv.has_work()

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        return 0, False

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        """Nothing is loaded."""

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, None

    @cached_property
    def _activations(self) -> ActivationMeter:
        return ActivationMeter()

    @property
    def _worker_memory(self) -> KvMemory:
        if self._memory is None:
            raise RuntimeError("vLLM did not ask for the KV memory context: this model's KV cache cannot be elastic")
        return self._memory
