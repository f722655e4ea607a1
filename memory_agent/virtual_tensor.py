"""The virtual tensor: a fixed range of addresses whose memory comes and goes slot by slot.

address                                                    address + slots * chunk_bytes
| slot 0: chunk | slot 1: none | slot 2: chunk |  ...  | slot n-1: none |
|<-------------------------- size_bytes ------------------------>|
"""

from collections.abc import KeysView

from memory_agent.chunks import PhysicalChunk
from memory_agent.errors import SettingsError
from memory_agent.vmm import ContractViolation, Vmm


class VirtualTensor:
    """Addresses of ``size_bytes``, divided into slots of ``chunk_bytes``. Its address never changes.

    Raises SettingsError when the backend cannot hold a mapping for every slot, OutOfDeviceMemory when no such range
    of addresses is left.
    """

    def __init__(self, vmm: Vmm, size_bytes: int, chunk_bytes: int) -> None:
        if size_bytes <= 0 or chunk_bytes <= 0 or chunk_bytes % vmm.granularity_bytes:
            raise SettingsError(
                f"{size_bytes} bytes in chunks of {chunk_bytes}: both must be positive, the chunk a "
                f"multiple of {vmm.granularity_bytes}"
            )
        self.slot_count = -(-size_bytes // chunk_bytes)
        if self.slot_count > vmm.max_mappings:
            raise SettingsError(
                f"{size_bytes} bytes in chunks of {chunk_bytes} may need {self.slot_count} memory mappings and "
                f"{vmm.max_mappings} are left; at most {vmm.max_mappings * chunk_bytes} bytes would fit, or raise the "
                f"system's limit (Linux: sysctl vm.max_map_count) by {self.slot_count - vmm.max_mappings}"
            )
        self.size_bytes = size_bytes
        self.chunk_bytes = chunk_bytes
        self._vmm = vmm
        self._chunks: dict[int, PhysicalChunk] = {}
        self.address = vmm.reserve(self.slot_count * chunk_bytes)

    @property
    def mapped_slots(self) -> KeysView[int]:
        """Slots with memory behind them; a live view."""
        return self._chunks.keys()

    @property
    def mapped_bytes(self) -> int:
        return len(self._chunks) * self.chunk_bytes

    def map_slot(self, slot: int, chunk: PhysicalChunk) -> None:
        """Put ``chunk`` behind an unmapped slot. Raises OutOfDeviceMemory; nothing was changed then."""
        if chunk.handle.size_bytes != self.chunk_bytes:
            raise ContractViolation(f"a chunk of {chunk.handle.size_bytes} bytes for slots of {self.chunk_bytes}")
        self._vmm.map(self._address_of(slot), chunk.handle)
        self._chunks[slot] = chunk

    def unmap_slot(self, slot: int) -> PhysicalChunk:
        """Take the chunk from a mapped slot. Raises OutOfDeviceMemory; the slot is still mapped then."""
        self._vmm.unmap(self._address_of(slot), self.chunk_bytes)
        return self._chunks.pop(slot)

    def close(self) -> None:
        """Give the addresses back. No slot may be mapped. Views of the memory must not be used any more."""
        self._vmm.free(self.address, self.slot_count * self.chunk_bytes)

    def _address_of(self, slot: int) -> int:
        if not 0 <= slot < self.slot_count:
            raise ContractViolation(f"slot {slot} is outside the tensor: slots are 0 to {self.slot_count - 1}")
        return self.address + slot * self.chunk_bytes
