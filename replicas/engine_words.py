"""What an engine says on the lease board: its words of its row, in the order that readers rely on."""

import os
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from memory_agent.lease_board import MAX_WORKERS, EngineWord, Row
from replicas.kv_moves import KvHandshake
from replicas.step_demand import NOTHING, StepDemand


class Holding(NamedTuple):
    """Bytes that an engine can hold at a moment, over all ranks: KV memory and activations."""

    kv_bytes: int
    activation_bytes: int


class StepBooks(NamedTuple):
    """What the blocks of an engine are at the start of a step.

    Attributes:
        used_blocks, mapped_blocks: of the KV cache, all groups.
        demand_bytes: of KV memory and activations that the queues could use now; floor_bytes: of them when idle, with
            the smallest step's activations.
        token_budget: of the step.
    """

    used_blocks: int
    mapped_blocks: int
    demand_bytes: int
    floor_bytes: int
    token_budget: int


class EngineWords:
    """Writes one engine's words.

    Args:
        row: of the engine.
        block_bytes: of a KV block, over all ranks.
    """

    def __init__(self, row: Row, block_bytes: int) -> None:
        self._row = row
        self._block_bytes = block_bytes

    def appear(
        self,
        handshakes: Sequence[KvHandshake],
        block_tokens: int,
        blocks_ceiling: int,
        rest_bytes: int,
        books: StepBooks,
    ) -> None:
        """First words; the process id comes last, because it makes the row live."""
        row = self._row
        seen = handshakes[:MAX_WORKERS]
        for i, handshake in enumerate(seen):
            row.set(EngineWord.WORKER_PID_0 + i, handshake.pid)
            row.set(EngineWord.WORKER_FD_0 + i, handshake.memory_fd)
        row.set(EngineWord.WORKER_COUNT, len(seen))
        row.set(EngineWord.BLOCK_BYTES, self._block_bytes)
        row.set(EngineWord.BLOCK_TOKENS, block_tokens)
        row.set(EngineWord.BLOCKS_CEILING, blocks_ceiling)
        row.set(EngineWord.REST_BYTES, rest_bytes)
        self.hold([Holding(rest_bytes, 0)], kept_bytes=0)
        self.begin_step(NOTHING, books, row.lease.revision)
        row.set(EngineWord.PID, os.getpid())

    def begin_step(self, demand: StepDemand, books: StepBooks, revision: int) -> None:
        """This step's numbers, after ``hold``: whoever sees the lease's revision acknowledged sees a commitment that
        obeys it or is shrinking to it."""
        row = self._row
        row.set(EngineWord.USED_BYTES, books.used_blocks * self._block_bytes)
        row.set(EngineWord.DEMAND_BYTES, books.demand_bytes)
        row.set(EngineWord.FLOOR_BYTES, books.floor_bytes)
        row.set(EngineWord.TOKEN_BUDGET, books.token_budget)
        row.set(EngineWord.RUNNING, demand.running)
        row.set(EngineWord.WAITING, demand.waiting)
        row.set(EngineWord.BUSY, int(demand.busy))
        row.set(EngineWord.PREEMPTIONS, demand.preemptions)
        row.set(EngineWord.BLOCKS_MAPPED, books.mapped_blocks)
        self.add(EngineWord.STEPS, 1)
        row.set(EngineWord.HEARTBEAT_NS, time.monotonic_ns())
        row.set(EngineWord.APPLIED_REVISION, revision)

    def hold(self, moments: Iterable[Holding], kept_bytes: int) -> None:
        """The most that can be held until the newest step has run, which is that of the fullest of ``moments``; of it
        ``kept_bytes`` are those of activations that heaps keep. A worker unmaps before it maps and before the forward,
        so the activations of a step and the memory that made room for them are never held together."""
        most = max(moments, key=sum)
        self._row.set(EngineWord.ACTIVATION_BYTES, most.activation_bytes)
        self._row.set(EngineWord.ACTIVATION_HELD_BYTES, kept_bytes)
        self._row.set(EngineWord.COMMITTED_BYTES, sum(most))

    def count_unmapped(self, moved_bytes: int, seconds: float) -> None:
        """What a move took from the KV cache is unmapped; nothing is counted where that is nothing."""
        if moved_bytes:
            self.add(EngineWord.DEFLATE_COUNT, 1)
            self.add(EngineWord.DEFLATE_BYTES, moved_bytes)
            self.add(EngineWord.DEFLATE_NS, int(seconds * 1e9))

    def count_mapped(self, moved_bytes: int, seconds: float) -> None:
        """What a move gave to the KV cache is mapped, likewise."""
        if moved_bytes:
            self.add(EngineWord.INFLATE_COUNT, 1)
            self.add(EngineWord.INFLATE_BYTES, moved_bytes)
            self.add(EngineWord.INFLATE_NS, int(seconds * 1e9))

    def add(self, word: EngineWord, value: int) -> None:
        self._row.set(word, self._row.get(word) + value)
