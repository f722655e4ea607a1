"""What moves between the device and the host buffer: into which slots, whether it pays, and what is under way.

``HostTier`` and ``KvTails`` say which blocks leave and which are wanted. The copies ride with the step to the workers,
and count when every rank has answered. A worker's order is: store, unmap, map, load, forward.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from memory_agent.host_buffer import HostBuffer
from memory_agent.lease_board import EngineWord, Row
from replicas.break_even import BreakEven, Move
from replicas.host_moves import HostCopy, HostReport, HostWork

logger = logging.getLogger(__name__)

_MOSTLY_PREFILL = 8
"""A step with this many times more tokens than requests says how fast prefill is."""


class Landed(NamedTuple):
    """Copies that have ended: keys of what is written on every rank, was loaded on every rank, was not found whole on
    one; and the device blocks of these loads."""

    stored: set[bytes]
    loaded: set[bytes]
    damaged: set[bytes]
    blocks: set[int]


class HostTraffic:
    """Lives in the scheduler's process; not thread-safe.

    Args:
        slots: slots of each rank's segment. block_bytes: of a block on one rank. block_tokens: tokens of a block.
        ranks: workers that copy.
    """

    def __init__(
        self,
        slots: int,
        block_bytes: int,
        block_tokens: int,
        ranks: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.buffer = HostBuffer(slots, slots)
        self.break_even = BreakEven(block_bytes, block_tokens)
        self._slot_bytes = block_bytes * ranks
        self._ranks = ranks
        self._clock = clock
        self._stores: list[HostCopy] = []
        self._loads: list[HostCopy] = []
        self._flights: dict[int, tuple[HostWork, list[HostReport]]] = {}
        self._sequence = 0
        self._loaded = 0
        self._damaged = 0

    def pays(self, move: Move, blocks: int, tokens: int | None = None) -> int:
        """How many of these blocks to move; ``tokens`` of each, where they are not full."""
        return self.break_even.grant(move, blocks, self._clock(), tokens) if blocks else 0

    def store(self, leaving: Mapping[bytes, int], tokens: int | None = None) -> None:
        """Copy device blocks, by key, in the coming step: those that are not there yet, as far as that pays and there
        is room. ``tokens`` of each, where they are not full."""
        new = [key for key in leaving if key not in self.buffer]
        granted = new[: self.pays(Move.STORE, len(new), tokens)]
        self._stores += [HostCopy(slot, leaving[key], key) for key, slot in self.buffer.begin_store(granted)]

    def load(self, keys: Sequence[bytes], block_ids: Sequence[int]) -> None:
        """Copy these blocks, stored or being stored, into the first of ``block_ids`` in the coming step."""
        slots = self.buffer.pin(keys)
        self._loads += [
            HostCopy(slot, block_id, key) for slot, block_id, key in zip(slots, block_ids, keys, strict=False)
        ]

    def loading(self) -> set[int]:
        """Device blocks with a load that not every rank has confirmed."""
        flying = (copy for work, _ in self._flights.values() for copy in work.load)
        return {copy.block_id for copy in (*self._loads, *flying)}

    def take(self) -> HostWork:
        """The copies of this step; they are in flight until every rank has answered."""
        work = HostWork(release=self.buffer.freed_slots(), store=self._stores, load=self._loads)
        self._stores, self._loads = [], []
        if work.release or work.store or work.load:
            self._sequence += 1
            work.sequence = self._sequence
            self._flights[work.sequence] = (work, [])
        return work

    def on_reports(self, reports: Iterable[HostReport]) -> Landed:
        """Answers of workers; a copy has ended when all ranks have answered."""
        landed = Landed(set(), set(), set(), set())
        for report in reports:
            self._learn(report)
            flight = self._flights.get(report.sequence)
            if flight is None:
                continue
            work, answers = flight
            answers.append(report)
            if len(answers) == self._ranks:
                del self._flights[report.sequence]
                self._finish(work, answers, landed)
        return landed

    @property
    def busy(self) -> bool:
        """Copies are in flight, or slots are to be released."""
        return bool(self._flights) or self.buffer.has_freed_slots

    def publish(self, row: Row) -> None:
        """This engine's words about its host buffer."""
        counts, decisions = self.buffer.counts, self.break_even.decisions
        row.set(EngineWord.HOST_BYTES, self.buffer.taken_slots * self._slot_bytes)
        row.set(EngineWord.HOST_STORED_BLOCKS, counts.stores)
        row.set(EngineWord.HOST_LOADED_BLOCKS, self._loaded)
        row.set(EngineWord.HOST_EVICTED_BLOCKS, counts.evictions)
        row.set(EngineWord.HOST_DAMAGED_BLOCKS, self._damaged)
        row.set(EngineWord.HOST_CAPACITY_BYTES, self.buffer.slots * self._slot_bytes)
        row.set(EngineWord.HOST_HITS, counts.hits)
        row.set(EngineWord.HOST_MISSES, counts.misses)
        stores, loads = decisions[Move.STORE], decisions[Move.LOAD]
        row.set(EngineWord.HOST_STORES_MOVED, stores.moved)
        row.set(EngineWord.HOST_STORES_PROBED, stores.probed)
        row.set(EngineWord.HOST_STORES_DECLINED, stores.declined)
        row.set(EngineWord.HOST_LOADS_MOVED, loads.moved)
        row.set(EngineWord.HOST_LOADS_PROBED, loads.probed)
        row.set(EngineWord.HOST_LOADS_DECLINED, loads.declined)

    def _learn(self, report: HostReport) -> None:
        self.break_even.observe_move(Move.STORE, report.stored_bytes, report.store_s)
        self.break_even.observe_move(Move.LOAD, report.loaded_bytes, report.load_s)
        if report.forward_tokens > _MOSTLY_PREFILL * report.forward_rows:
            self.break_even.observe_prefill(report.forward_tokens, report.forward_s)

    def _finish(self, work: HostWork, answers: Sequence[HostReport], landed: Landed) -> None:
        unstored = {key for answer in answers for key in answer.unstored}
        self.buffer.abort_store([copy.key for copy in work.store if copy.key in unstored])
        stored = [copy.key for copy in work.store if copy.key not in unstored]
        self.buffer.finish_store(stored)
        unloaded = {key for answer in answers for key in answer.unloaded}
        if unloaded:
            logger.warning("%d KV blocks of the host buffer are not whole: they are computed again", len(unloaded))
            self._damaged += len(unloaded)
            self.buffer.discard(unloaded)
        for copy in work.load:
            self.buffer.unpin([copy.key])
        loaded = [copy.key for copy in work.load if copy.key not in unloaded]
        self._loaded += len(loaded)
        landed.stored.update(stored)
        landed.loaded.update(loaded)
        landed.damaged.update(unloaded)
        landed.blocks.update(copy.block_id for copy in work.load)
