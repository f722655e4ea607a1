"""The physical memory of one device as the pool sees it: the contract of a backend, and a ledger that enforces it.

    reserve ----> range of addresses, nothing behind it: a touch kills the process
    create  ----> chunk of physical memory, zeroed, committed now
    map     ----> chunk behind an address
    unmap, release, free: the same backwards

A backend is used by one thread at a time; its caller serialises. Every call either does what it says or raises
``OutOfDeviceMemory`` and has changed nothing. A caller that breaks the contract gets ``ContractViolation``, before
anything was touched.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Protocol


class ContractViolation(AssertionError):
    """The caller broke the memory layer's contract: a bug, never a condition to wait out."""


@dataclass(frozen=True)
class ChunkHandle:
    """One physical allocation of a backend.

    Attributes:
        id: the backend's name for it, unique among those alive (a file offset, a driver handle).
        size_bytes: a multiple of the granularity.
    """

    id: int
    size_bytes: int


class Vmm(Protocol):
    """A virtual memory manager: address ranges and physical chunks that are mapped into them."""

    @property
    def granularity_bytes(self) -> int:
        """Every size and every address handed to this backend is a multiple of this."""
        ...

    @property
    def max_mappings(self) -> int:
        """Most mappings the backend can hold. A range divided into n slots needs n at worst, when mapped and unmapped
        slots alternate. ``sys.maxsize`` where nothing bounds it."""
        ...

    def reserve(self, size_bytes: int) -> int:
        """Reserve addresses without memory and return the first. A touch of an unmapped address kills the process.

        Raises OutOfDeviceMemory when no such range is left.
        """
        ...

    def free(self, address: int, size_bytes: int) -> None:
        """Give back a whole range that ``reserve`` returned. Nothing may be mapped in it."""
        ...

    def create(self, size_bytes: int) -> ChunkHandle:
        """Commit zeroed physical memory, now. Raises OutOfDeviceMemory when there is none."""
        ...

    def release(self, handle: ChunkHandle) -> None:
        """Return the chunk's memory to the system before coming back. The chunk must not be mapped; its data is lost.

        Raises OutOfDeviceMemory when the system refuses; the chunk is as it was.
        """
        ...

    def map(self, address: int, handle: ChunkHandle) -> None:
        """Put the chunk behind ``address``, for reading and writing.

        The addresses lie in one reserved range and are unmapped; a chunk is mapped at most once. Data that the chunk
        held stays. Raises OutOfDeviceMemory when the system has no room for the mapping itself.
        """
        ...

    def unmap(self, address: int, size_bytes: int) -> None:
        """Undo the one ``map`` made at ``address`` with a chunk of ``size_bytes``; the chunk keeps memory and data.

        Nothing may access the addresses any more. Raises OutOfDeviceMemory when the system refuses; the mapping stays.
        """
        ...

    def held_bytes(self) -> int:
        """Physical bytes held through this backend, as the operating system or the driver counts them."""
        ...

    def close(self) -> None:
        """Give back everything, mapped or not; again is allowed. Views of the memory must not be used any more."""
        ...


class VmmLedger:
    """What a backend has handed out. Backends ask it before they act, so that a caller's bug cannot reach other memory.

    ``check_x`` raises ContractViolation and changes nothing; ``x`` records what the backend has then done.
    """

    def __init__(self, granularity_bytes: int) -> None:
        self._granularity_bytes = granularity_bytes
        self.ranges: dict[int, int] = {}
        """Reserved ranges: first address -> bytes."""
        self.chunks: dict[ChunkHandle, int | None] = {}
        """Living chunks -> the address at which each is mapped."""
        self._mappings: dict[int, ChunkHandle] = {}
        self._addresses: list[int] = []  # of the mappings, sorted: neighbours answer "does it overlap?"

    def check_size(self, size_bytes: int) -> None:
        if size_bytes <= 0 or size_bytes % self._granularity_bytes:
            raise ContractViolation(f"{size_bytes} bytes is not a positive multiple of {self._granularity_bytes}")

    def check_free(self, address: int, size_bytes: int) -> None:
        if self.ranges.get(address) != size_bytes:
            raise ContractViolation(f"no range of {size_bytes} bytes was reserved at {address:#x}")
        at = bisect_left(self._addresses, address)
        if at < len(self._addresses) and self._addresses[at] < address + size_bytes:
            raise ContractViolation(f"a chunk is still mapped at {self._addresses[at]:#x}")

    def check_release(self, handle: ChunkHandle) -> None:
        if handle not in self.chunks:
            raise ContractViolation(f"{handle} is not alive")
        if self.chunks[handle] is not None:
            raise ContractViolation(f"{handle} is still mapped at {self.chunks[handle]:#x}")

    def check_map(self, address: int, handle: ChunkHandle) -> None:
        self.check_release(handle)
        end = address + handle.size_bytes
        if not any(base <= address and end <= base + size for base, size in self.ranges.items()):
            raise ContractViolation(f"{address:#x} to {end:#x} lies in no reserved range")
        if address % self._granularity_bytes:
            raise ContractViolation(f"{address:#x} is not a multiple of {self._granularity_bytes}")
        at = bisect_left(self._addresses, address)
        if at < len(self._addresses) and self._addresses[at] < end:
            raise ContractViolation(f"a chunk is already mapped at {self._addresses[at]:#x}")
        if at and self._addresses[at - 1] + self._mappings[self._addresses[at - 1]].size_bytes > address:
            raise ContractViolation(f"the chunk mapped at {self._addresses[at - 1]:#x} reaches over {address:#x}")

    def check_unmap(self, address: int, size_bytes: int) -> None:
        handle = self._mappings.get(address)
        if handle is None or handle.size_bytes != size_bytes:
            raise ContractViolation(f"no chunk of {size_bytes} bytes is mapped at {address:#x}")

    def map(self, address: int, handle: ChunkHandle) -> None:
        self.chunks[handle] = address
        self._mappings[address] = handle
        insort(self._addresses, address)

    def unmap(self, address: int) -> None:
        self.chunks[self._mappings.pop(address)] = None
        del self._addresses[bisect_left(self._addresses, address)]
