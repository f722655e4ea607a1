"""A Vmm in plain Python: strict about its contract, and failing on purpose at any call."""

import sys
from collections import Counter
from itertools import count

from memory_agent.errors import OutOfDeviceMemory
from memory_agent.vmm import ChunkHandle, VmmLedger


class FailurePlan:
    """Which calls shall fail. A backend calls ``check`` at the start of each call, before it changes anything.

    Attributes:
        calls: how often each call was made, failed ones included.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self._failing: set[tuple[str, int]] = set()

    def fail_at(self, call_name: str, nth: int, times: int = 1) -> None:
        """Let the ``nth`` call of ``call_name`` from now on (1 is the next) fail, and the ``times - 1`` after it."""
        first = self.calls[call_name] + nth
        self._failing.update((call_name, at) for at in range(first, first + times))

    def clear(self) -> None:
        """Forget the failures that have not happened yet."""
        self._failing.clear()

    def check(self, call_name: str) -> None:
        """Count the call. Raises OutOfDeviceMemory when it shall fail."""
        self.calls[call_name] += 1
        if (call_name, self.calls[call_name]) in self._failing:
            raise OutOfDeviceMemory(f"{call_name} number {self.calls[call_name]} fails on purpose")


class FakeVmm:
    """Addresses and chunks as numbers; nothing is behind them. See ``memory_agent.vmm.Vmm`` for the contract."""

    def __init__(self, granularity_bytes: int, capacity_bytes: int, max_mappings: int = sys.maxsize) -> None:
        self.granularity_bytes = granularity_bytes
        self.max_mappings = max_mappings
        self.plan = FailurePlan()
        self._capacity_bytes = capacity_bytes
        self._ledger = VmmLedger(granularity_bytes)
        self._next_address = 1024 * granularity_bytes
        self._ids = count()

    def fail_at(self, call_name: str, nth: int, times: int = 1) -> None:
        """See ``FailurePlan.fail_at``."""
        self.plan.fail_at(call_name, nth, times)

    def reserve(self, size_bytes: int) -> int:
        self.plan.check("reserve")
        self._ledger.check_size(size_bytes)
        address = self._next_address
        self._next_address += size_bytes + self.granularity_bytes  # a gap, so that running over the end is noticed
        self._ledger.ranges[address] = size_bytes
        return address

    def free(self, address: int, size_bytes: int) -> None:
        self.plan.check("free")
        self._ledger.check_free(address, size_bytes)
        del self._ledger.ranges[address]

    def create(self, size_bytes: int) -> ChunkHandle:
        self.plan.check("create")
        self._ledger.check_size(size_bytes)
        if self.held_bytes() + size_bytes > self._capacity_bytes:
            raise OutOfDeviceMemory(f"{self.held_bytes()} of {self._capacity_bytes} bytes are held")
        handle = ChunkHandle(next(self._ids), size_bytes)
        self._ledger.chunks[handle] = None
        return handle

    def release(self, handle: ChunkHandle) -> None:
        self.plan.check("release")
        self._ledger.check_release(handle)
        del self._ledger.chunks[handle]

    def map(self, address: int, handle: ChunkHandle) -> None:
        self.plan.check("map")
        self._ledger.check_map(address, handle)
        self._ledger.map(address, handle)

    def unmap(self, address: int, size_bytes: int) -> None:
        self.plan.check("unmap")
        self._ledger.check_unmap(address, size_bytes)
        self._ledger.unmap(address)

    def held_bytes(self) -> int:
        return sum(handle.size_bytes for handle in self._ledger.chunks)

    def close(self) -> None:
        self._ledger = VmmLedger(self.granularity_bytes)
