"""A worker's side of migrations: copies KV blocks between the device and the transport."""

from replicas.kv_blocks import KvBlocks
from replicas.kv_transport import Transport, TransportError
from replicas.migration import MigrationReport, MigrationWork


class MigrationCopies:
    """Carries out one MigrationWork after the other, in the worker's own order of steps."""

    def __init__(self, transport: Transport, blocks: KvBlocks) -> None:
        self._transport = transport
        self._blocks = blocks
        self._report = MigrationReport(0)
        self._invalid: set[int] = set()

    def store(self, work: MigrationWork) -> None:
        """Before any block is unmapped or written anew."""
        self._report.sequence = work.sequence
        self._transport.withdraw(work.release)
        for copy in work.store:
            try:
                self._transport.send(copy.slot, copy.key, self._blocks.fetch(copy.block_id))
            except TransportError:
                self._report.unsent.append(copy.key)

    def load(self, work: MigrationWork) -> None:
        """When the step's extents are mapped."""
        for one in work.load:
            parts = self._blocks.room(one.block_id)
            if not self._transport.receive(one.origin, one.place, one.key, parts):
                # Whoever gets the block next reads all of it where they fill a part, times zero: it may hold no NaN.
                for part in parts:
                    part[...] = 0
                self._report.unloaded.append(one.key)
                self._invalid.add(one.block_id)
            self._blocks.put(one.block_id)

    def finish(self) -> MigrationReport | None:
        """What the step did; None for nothing."""
        report, self._report = self._report, MigrationReport(0)
        return report if report.sequence else None

    def take_invalid_blocks(self) -> set[int]:
        """Device blocks of which a load failed since the last call."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def close(self) -> None:
        self._transport.close()
