"""The host buffer's index: which KV block lies in which slot, and who may go. Pure; the scheduler asks it each step.

               begin_store            finish_store            pin
    free slot -------------> STORING --------------> STORED <------> pinned         match_prefix finds STORED ones
        ^                       |                       |    unpin
        |<---- abort_store -----+--- eviction, drop ----+                           only unpinned ones are evicted
        |
        +--> freed_slots: what the workers have to release, so that the bytes go back to the operating system

The copies are the workers' (``memory_agent.host_segment``). They carry out what a step brings them in this order:
releases, stores, loads. So a slot may be handed out again in the very step in which it was freed, and a block may be
pinned from the step on that stores it; where that store fails, so does the load.

Of a prefix the last blocks go first: without the blocks before them they are of no use.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from memory_agent.errors import SettingsError
from memory_agent.vmm import ContractViolation


@dataclass
class HostBufferCounts:
    """Blocks since the start.

    Attributes:
        hits, misses: asked for by ``match_prefix`` and found stored, or not.
        stores: written whole.
        aborted: stores that did not come to an end.
        evictions: stored blocks that had to make room for others or for a smaller size.
        discarded: stored blocks that turned out damaged.
    """

    hits: int = 0
    misses: int = 0
    stores: int = 0
    aborted: int = 0
    evictions: int = 0
    discarded: int = 0


@dataclass
class _Entry:
    """A slot that is taken. ``pins``: loads under way; ``lost``: is not found any more, and leaves when its store has
    ended and its last load."""

    slot: int
    stored: bool = False
    pins: int = 0
    lost: bool = False


class HostBuffer:
    """Slots by key, least recently used first to go. Deterministic; used by one thread.

    Args:
        slots: physical ceiling: slots of each rank's segment.
        logical_slots: how many of them may be taken, at first; see ``set_logical_slots``.

    A call that names a block in the wrong state raises ContractViolation and has changed nothing.
    """

    def __init__(self, slots: int, logical_slots: int) -> None:
        if slots <= 0:
            raise SettingsError(f"a host buffer of {slots} slots cannot hold anything; give it at least one")
        self.slots = slots
        self.counts = HostBufferCounts()
        self._logical_slots = 0
        self._entries: dict[bytes, _Entry] = {}
        self._evictable: OrderedDict[bytes, None] = OrderedDict()  # stored and unpinned, least recently used first
        self._clean = list(range(slots - 1, -1, -1))  # free, without bytes; lowest last, so that it is taken first
        self._dirty: dict[int, None] = {}  # free, the workers have not been told to release it
        self.set_logical_slots(logical_slots)

    @property
    def logical_slots(self) -> int:
        return self._logical_slots

    @property
    def taken_slots(self) -> int:
        """Slots that hold or await a block. Above ``logical_slots`` only while nothing of it can be evicted."""
        return len(self._entries)

    @property
    def has_freed_slots(self) -> bool:
        """Slots have been freed that ``freed_slots`` has not named yet."""
        return bool(self._dirty)

    def __contains__(self, key: object) -> bool:
        """Whether the block is stored, or being stored."""
        return key in self._entries

    def match_prefix(self, keys: Sequence[bytes], again: bool = False, storing: bool = False) -> int:
        """How many leading keys are stored. Changes nothing but the counts of hits and misses.

        Args:
            again: the question has been asked before for the same request, and is not counted.
            storing: those that are being stored count too.
        """
        found = 0
        for key in keys:
            entry = self._entries.get(key)
            if entry is None or entry.lost or not (entry.stored or storing):
                break
            found += 1
        if not again:
            self.counts.hits += found
            self.counts.misses += len(keys) - found
        return found

    def begin_store(self, keys: Sequence[bytes]) -> list[tuple[bytes, int]]:
        """Take a slot for each key that has none, from the first on while there is room: what the workers shall write.

        Evicts the least recently used stored blocks for them, but none of ``keys``. Keys that are known count as used.
        """
        self.touch(keys)
        wanted = set(keys)
        begun = []
        for key in keys:
            if key in self._entries:
                continue
            if len(self._entries) >= self._logical_slots and not self._evict_one(wanted):
                break
            entry = self._entries[key] = _Entry(self._take_slot())
            begun.append((key, entry.slot))
        return begun

    def finish_store(self, keys: Sequence[bytes]) -> None:
        """These blocks are written, on every rank."""
        for entry in self._each(keys, stored=False):
            entry.stored = True
        self.counts.stores += len(keys)
        self._rest(keys)

    def abort_store(self, keys: Sequence[bytes]) -> None:
        """These blocks will not be written: on every rank the write has ended, failed or was never begun. Those that
        are pinned already are found no more and leave with their last pin."""
        for entry in self._each(keys, stored=False):
            entry.stored = entry.lost = True
        self.counts.aborted += len(keys)
        self._rest(keys)

    def pin(self, keys: Sequence[bytes]) -> list[int]:
        """Keep these blocks, stored or being stored, for a load; their slots. Pins add up."""
        entries = self._each(keys)
        if any(entry.lost for entry in entries):
            raise ContractViolation("a discarded block cannot be loaded: ask match_prefix first")
        for key, entry in zip(keys, entries, strict=True):
            entry.pins += 1
            self._evictable.pop(key, None)
        return [entry.slot for entry in entries]

    def unpin(self, keys: Sequence[bytes]) -> None:
        """The load has ended, on every rank, well or not. Counts as a use."""
        entries = self._each(keys, stored=True)
        if not all(entry.pins for entry in entries):
            raise ContractViolation("a block is unpinned more often than it was pinned")
        for entry in entries:
            entry.pins -= 1
        self._rest(keys)

    def touch(self, keys: Sequence[bytes]) -> None:
        """Count these blocks as used now; keys that are not stored are passed over."""
        for key in reversed(keys):
            if key in self._evictable:
                self._evictable.move_to_end(key)

    def discard(self, keys: Iterable[bytes]) -> None:
        """Forget stored blocks that turned out damaged; pinned ones are found no more and leave with their last pin."""
        for key in keys:
            entry = self._entries.get(key)
            if entry is not None and entry.stored and not entry.lost:
                self.counts.discarded += 1
                self._lose(key, entry)

    def drop(self, keys: Iterable[bytes]) -> None:
        """Forget blocks that nobody will ask for; those that are pinned or being stored are found no more, and leave
        when they are not. Unknown keys are passed over."""
        for key in keys:
            entry = self._entries.get(key)
            if entry is not None and not entry.lost:
                self._lose(key, entry)

    def clear(self) -> None:
        """Drop every block."""
        self.drop(list(self._entries))

    def set_logical_slots(self, logical_slots: int) -> None:
        """Let at most this many slots be taken. Evicts down to it now; what is pinned or being written leaves when it
        no longer is. Raises SettingsError outside 0 to ``slots``."""
        if not 0 <= logical_slots <= self.slots:
            raise SettingsError(f"{logical_slots} logical slots of {self.slots}: choose 0 to {self.slots}")
        self._logical_slots = logical_slots
        self._shrink()

    def freed_slots(self) -> list[int]:
        """Slots freed since the last call and not taken again: the workers release them before they write any other."""
        freed = sorted(self._dirty)
        self._clean += reversed(freed)
        self._dirty.clear()
        return freed

    def check_conservation(self) -> None:
        """Raise ContractViolation unless every slot is free or holds one block, and only idle blocks are evictable."""
        slots = [entry.slot for entry in self._entries.values()] + self._clean + list(self._dirty)
        if sorted(slots) != list(range(self.slots)):
            raise ContractViolation(f"slots are lost or used twice: {sorted(slots)} of {self.slots}")
        idle = {key for key, entry in self._entries.items() if entry.stored and not entry.pins}
        if idle != set(self._evictable):
            raise ContractViolation(f"{len(idle)} blocks are stored and unpinned, {len(self._evictable)} evictable")
        if self._evictable and len(self._entries) > self._logical_slots:
            raise ContractViolation(f"{len(self._entries)} slots are taken of {self._logical_slots}, some evictable")

    def _lose(self, key: bytes, entry: _Entry) -> None:
        entry.lost = True
        if entry.stored and not entry.pins:
            self._free(key)

    def _each(self, keys: Sequence[bytes], stored: bool | None = None) -> list[_Entry]:
        """The entries of these keys. Raises ContractViolation for one that is missing, in the other state or double."""
        if len(set(keys)) != len(keys):
            raise ContractViolation("a block is named twice")
        entries = [
            entry for key in keys if (entry := self._entries.get(key)) and (stored is None or entry.stored == stored)
        ]
        if len(entries) != len(keys):
            state = {True: "stored", False: "being stored", None: "there"}[stored]
            raise ContractViolation(f"of {len(keys)} blocks only {len(entries)} are {state}")
        return entries

    def _rest(self, keys: Sequence[bytes]) -> None:
        """Stored blocks were used just now; of those without a pin the lost ones leave, and the others may be evicted
        from here on."""
        for key in reversed(keys):
            entry = self._entries[key]
            if entry.lost and not entry.pins:
                self._free(key)
            elif not entry.pins:
                self._evictable[key] = None
        self._shrink()

    def _shrink(self) -> None:
        while len(self._entries) > self._logical_slots and self._evict_one(set()):
            pass

    def _evict_one(self, wanted: set[bytes]) -> bool:
        """Evict the least recently used block; False where none may go. ``wanted`` ones have just been touched."""
        oldest = next(iter(self._evictable), None)
        if oldest is None or oldest in wanted:
            return False
        self._free(oldest)
        self.counts.evictions += 1
        return True

    def _free(self, key: bytes) -> None:
        self._dirty[self._entries.pop(key).slot] = None
        self._evictable.pop(key, None)

    def _take_slot(self) -> int:
        """A free slot, rather one that still has its memory. There is one: fewer entries than logical slots."""
        return self._dirty.popitem()[0] if self._dirty else self._clean.pop()
