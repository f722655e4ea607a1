"""A worker's side of the host buffer: copies KV blocks between the device and its segment in shared memory."""

import time

from memory_agent.errors import OutOfDeviceMemory
from memory_agent.host_segment import HostSegment
from replicas.host_moves import HostReport, HostWork
from replicas.kv_blocks import KvBlocks


class HostCopies:
    """Carries out one HostWork after the other, in the worker's own order of steps.

    Args:
        segment: this rank's, to write.
        blocks: those of the device.
    """

    def __init__(self, segment: HostSegment, blocks: KvBlocks) -> None:
        self._segment = segment
        self._blocks = blocks
        self._report = HostReport(0)
        self._invalid: set[int] = set()
        self._forward: tuple[int, int, float] | None = None

    def store(self, work: HostWork) -> None:
        """Before any block is unmapped or written anew."""
        self._report.sequence = work.sequence
        self._segment.release(work.release)
        started = time.perf_counter()
        for copy in work.store:
            parts = self._blocks.fetch(copy.block_id)
            try:
                self._segment.write(copy.slot, copy.key, parts)
                self._report.stored_bytes += sum(part.nbytes for part in parts)
            except OutOfDeviceMemory:
                self._report.unstored.append(copy.key)
        self._report.store_s = time.perf_counter() - started

    def load(self, work: HostWork) -> None:
        """When the step's extents are mapped."""
        started = time.perf_counter()
        for copy in work.load:
            parts = self._blocks.room(copy.block_id)
            if self._segment.read_into(copy.slot, copy.key, parts):
                self._report.loaded_bytes += sum(part.nbytes for part in parts)
            else:
                # Whoever gets the block next reads all of it where they fill a part, times zero: it may hold no NaN.
                for part in parts:
                    part[...] = 0
                self._report.unloaded.append(copy.key)
                self._invalid.add(copy.block_id)
            self._blocks.put(copy.block_id)
        self._report.load_s = time.perf_counter() - started

    def start_forward(self, tokens: int, rows: int) -> None:
        """The forward of a step of so many tokens and requests comes next."""
        self._forward = (tokens, rows, time.perf_counter()) if tokens else None

    def finish(self) -> HostReport | None:
        """What the step did; None for a step that neither copied nor computed."""
        if self._forward is not None:
            tokens, rows, started = self._forward
            self._report.forward_tokens, self._report.forward_rows = tokens, rows
            self._report.forward_s = time.perf_counter() - started
        report, self._report = self._report, HostReport(0)
        self._forward = None
        return report if report.sequence or report.forward_tokens else None

    def close(self) -> None:
        """Give the segment's memory back."""
        self._segment.path.unlink(missing_ok=True)
        self._segment.close()

    def take_invalid_blocks(self) -> set[int]:
        """Device blocks of which a load failed since the last call."""
        invalid, self._invalid = self._invalid, set()
        return invalid
