"""The scheduler's side of the host buffer, as vLLM's connector calls it: a preempted request comes back by loading.

It resumes with the full blocks that are still on the device, then with those that the host buffer has (``HostTier``),
then with its last, partly filled one (``KvTails``), and computes its newest token. A new request finds full blocks too.

Loads are believed before all ranks have confirmed them: see ``LoadDoubts``.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from memory_agent.lease_board import EngineWord, Row
from replicas.host_moves import HostReport, HostWork
from replicas.host_tier import HostTier
from replicas.host_traffic import HostTraffic
from replicas.kv_tail import KvTails, tail_of
from replicas.load_doubts import LoadDoubts

if TYPE_CHECKING:
    from vllm.v1.request import Request


class HostKv:
    """Lives in the scheduler's process; not thread-safe.

    Args:
        pool: vLLM's blocks, of one KV cache group. block_tokens: tokens of a block.
        traffic: carries the copies.
        fingerprint: of the KV on the first rank, 32 bytes.
    """

    def __init__(self, pool: BlockPool, block_tokens: int, traffic: HostTraffic, fingerprint: bytes) -> None:
        self.traffic = traffic
        self.tier = HostTier(traffic, pool, block_tokens, fingerprint)
        self.tails = KvTails(traffic, block_tokens, fingerprint)
        self._block_tokens = block_tokens
        self._doubts = LoadDoubts(traffic.loading, self.tier.disbelieve)

    def match(self, request: "Request", computed_tokens: int) -> int:
        """Tokens of a waiting request, after the ``computed_tokens`` that the device has, that are to be loaded."""
        request_id, tokens = request.request_id, request.num_tokens
        resumed = request.num_preemptions > 0
        loaded = self.tier.match(request_id, request.block_hashes, computed_tokens, tokens, resumed)
        return loaded + self.tails.match(request_id, computed_tokens + loaded, tokens)

    def allocate(self, request: "Request", block_ids: Sequence[int], loaded_tokens: int) -> None:
        """vLLM has given the request these blocks, and expects ``loaded_tokens`` tokens in them to be loaded."""
        self.tier.allocate(request.request_id, block_ids, loaded_tokens)
        self.tails.allocate(request.request_id, block_ids, loaded_tokens)

    def preempt(self, request: "Request", blocks: Sequence[KVCacheBlock]) -> None:
        """A running request is about to lose these blocks, whose content lasts until the workers' part of the coming
        step. What steps in flight compute is there then: workers run their steps in order."""
        self.tier.watch_blocks(blocks)
        self._doubts.lose(request.request_id, [block.block_id for block in blocks])
        computed, unknown = request.num_computed_tokens, request.num_output_placeholders
        tail = tail_of(request.request_id, computed, unknown, self._block_tokens)
        # The tokens of a streaming session may change, and some requests must compute all of their prompt.
        if tail is None or request.resumable or request.skip_reading_prefix_cache:
            return
        block = blocks[tail.first_token // self._block_tokens]
        if block.block_hash is None:
            self.tails.keep(tail, block.block_id)

    def finish(self, request_id: str, block_ids: Sequence[int]) -> None:
        """The request has ended, and is about to lose these blocks."""
        self.tier.forget(request_id)
        self.tails.forget(request_id)
        self._doubts.ended(request_id)
        self._doubts.lose(None, block_ids)

    def fail(self, invalid_block_ids: set[int], running: Mapping[str, Sequence[int]]) -> list[str]:
        """These device blocks could not be loaded. Call it before anything else is done about the step that failed.

        running: blocks of every running request.

        Returns the requests that have computed with them, running or preempted since: they have to start again, and
        their output in flight is to be dropped.
        """
        wrong = self._doubts.fail(invalid_block_ids, running)
        for request_id in wrong:
            self.tails.forget(request_id)
        return wrong

    def take(self) -> HostWork:
        """The copies of this step."""
        self.tier.end_step()
        return self.traffic.take()

    def on_reports(self, reports: Iterable[HostReport]) -> None:
        """Answers of workers."""
        landed = self.traffic.on_reports(reports)
        self.tails.on_landed(landed)
        self._doubts.landed(landed.blocks)

    def clear(self) -> None:
        """Forget every block: the same tokens would have other KV from now on."""
        self.tier.clear()
        self.tails.clear()
        self.traffic.buffer.clear()

    def publish(self, row: Row) -> None:
        """This engine's words about its host buffer."""
        self.traffic.publish(row)
        row.set(EngineWord.HOST_STORED_TAILS, self.tails.stored)
        row.set(EngineWord.HOST_LOADED_TAILS, self.tails.loaded)
