"""The CUDA driver API in plain Python, as far as CudaVmm calls it and as strict as the driver's own documentation.

Memory is real: a bytearray an allocation, full of garbage when it is created, as another process left it. Filling it
takes effect when its stream is synchronised, so a missing wait is seen. An allocation lives until it is neither mapped
nor referred to by a handle or a file descriptor.
"""

# ruff: noqa: N802, the functions are named as the driver names them

from collections import Counter
from enum import IntEnum
from itertools import count
from types import SimpleNamespace
from typing import Any

GARBAGE = 0xA5


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


OK, INVALID = Result.CUDA_SUCCESS, Result.CUDA_ERROR_INVALID_VALUE


class Attribute(IntEnum):
    CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 102
    CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED = 103


class Allocation:
    def __init__(self, size: int) -> None:
        self.data = bytearray([GARBAGE]) * size
        self.references = 1
        self.mapped = 0


class Mapping:
    def __init__(self, allocation: Allocation) -> None:
        self.allocation = allocation
        self.accessible = False


class FakeCudaDriver:
    """Stands for the module ``cuda.bindings.driver``: functions that return (CUresult, values...).

    Args:
        granularity: of sizes and addresses, in bytes.
        capacity: bytes of allocations that can live at once.

    Attributes:
        busy: addresses that queued kernels use; emptied by cuCtxSynchronize.
        faults: what a real device would have crashed on or silently corrupted.
        calls: how often each function was called.
    """

    allocation = Allocation
    CUresult = Result
    CUdevice_attribute = Attribute
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemAllocationHandleType = SimpleNamespace(CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)

    def __init__(self, granularity: int, capacity: int) -> None:
        self.granularity = granularity
        self.capacity = capacity
        self.attributes = dict.fromkeys(Attribute, 1)
        self.busy: set[int] = set()
        self.faults: list[str] = []
        self.calls: Counter[str] = Counter()
        self.reserved: dict[int, int] = {}
        self.mappings: dict[int, Mapping] = {}
        self.handles: dict[int, Allocation] = {}
        self.descriptors: dict[int, Allocation] = {}
        self.contexts: list[str] = []
        self.retained = 0
        self.streams: dict[int, list[tuple[int, int, int]]] = {}
        self._allocations: list[Allocation] = []
        self._next_address = 1 << 40
        self._numbers = count(7)
        self._failing: dict[tuple[str, int], Result] = {}

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not name.startswith("cu") or name.startswith("cuGetError"):
            return value

        def call(*args: Any) -> tuple[Any, ...]:
            self.calls[name] += 1
            planned = self._failing.pop((name, self.calls[name]), None)
            return (planned,) if planned is not None else value(*args)

        return call

    def fail_at(self, name: str, nth: int, error: Result) -> None:
        """Let the ``nth`` call of a function from now on (1 is the next) change nothing and return ``error``."""
        self._failing[name, self.calls[name] + nth] = error

    def fail_no_more(self) -> None:
        """Forget the failures that have not happened yet."""
        self._failing.clear()

    @property
    def held(self) -> int:
        """Bytes of the allocations that live, whoever keeps them."""
        return sum(len(allocation.data) for allocation in self._allocations)

    def memory(self, address: int) -> bytearray:
        """What is mapped at exactly this address, for a kernel to read or write."""
        mapping = self.mappings[address]
        assert mapping.accessible, f"illegal access at {address:#x}"
        return mapping.allocation.data

    def cuInit(self, flags: int) -> tuple[Any, ...]:
        return (OK if flags == 0 else INVALID,)

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:
        return (OK, 0) if ordinal == 0 else (Result.CUDA_ERROR_INVALID_DEVICE, None)

    def cuDeviceGetAttribute(self, attribute: Attribute, device: int) -> tuple[Any, ...]:
        return OK, self.attributes[attribute]

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, ...]:
        self.retained += 1
        return OK, "primary"

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[Any, ...]:
        if not self.retained:
            return (Result.CUDA_ERROR_INVALID_CONTEXT,)
        self.retained -= 1
        return (OK,)

    def cuCtxPushCurrent(self, context: str) -> tuple[Any, ...]:
        if not self.retained:
            return (Result.CUDA_ERROR_INVALID_CONTEXT,)
        self.contexts.append(context)
        return (OK,)

    def cuCtxPopCurrent(self) -> tuple[Any, ...]:
        return (OK, self.contexts.pop()) if self.contexts else (Result.CUDA_ERROR_INVALID_CONTEXT, None)

    def cuCtxSynchronize(self) -> tuple[Any, ...]:
        if not self.contexts:
            return (Result.CUDA_ERROR_INVALID_CONTEXT,)
        self.busy.clear()
        return (OK,)

    def cuStreamCreate(self, flags: int) -> tuple[Any, ...]:
        if not self.contexts:
            return Result.CUDA_ERROR_INVALID_CONTEXT, None
        stream = next(self._numbers)
        self.streams[stream] = []
        return OK, stream

    def cuStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        return (INVALID,) if self.streams.pop(stream, None) is None else (OK,)

    def cuStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        for address, value, size in self.streams[stream]:
            mapping = self.mappings.get(address)
            if mapping is None or not mapping.accessible or size > len(mapping.allocation.data):
                self.faults.append(f"a memset at {address:#x} found no memory")
                return (Result.CUDA_ERROR_ILLEGAL_ADDRESS,)
            mapping.allocation.data[:size] = bytes([value]) * size
        self.streams[stream].clear()
        return (OK,)

    def cuMemsetD8Async(self, address: int, value: int, size: int, stream: int) -> tuple[Any, ...]:
        if not self.contexts:
            return (Result.CUDA_ERROR_INVALID_CONTEXT,)
        self.streams[stream].append((address, value, size))
        return (OK,)

    def cuMemGetInfo(self) -> tuple[Any, ...]:
        if not self.contexts:
            return Result.CUDA_ERROR_INVALID_CONTEXT, None, None
        return OK, self.capacity - self.held, self.capacity

    def cuMemGetAllocationGranularity(self, properties: Any, option: int) -> tuple[Any, ...]:
        return (OK, self.granularity) if properties.location.type == 1 else (INVALID, None)

    def cuMemAddressReserve(self, size: int, alignment: int, hint: int, flags: int) -> tuple[Any, ...]:
        if not self._fits(size) or alignment & (alignment - 1) or flags:
            return INVALID, None
        address = self._next_address
        self._next_address += size + self.granularity  # a gap, so that running over the end is noticed
        self.reserved[address] = size
        return OK, address

    def cuMemAddressFree(self, address: int, size: int) -> tuple[Any, ...]:
        if self.reserved.get(address) != size or self._mapped_in(address, size):
            return (INVALID,)
        del self.reserved[address]
        return (OK,)

    def cuMemCreate(self, size: int, properties: Any, flags: int) -> tuple[Any, ...]:
        if not self._fits(size) or flags or properties.type != 1 or properties.location.id != 0:
            return INVALID, None
        if self.held + size > self.capacity:
            return Result.CUDA_ERROR_OUT_OF_MEMORY, None
        allocation = self.allocation(size)
        self._allocations.append(allocation)
        return OK, self._handle_of(allocation)

    def cuMemRelease(self, handle: int) -> tuple[Any, ...]:
        allocation = self.handles.pop(handle, None)
        if allocation is None:
            return (INVALID,)
        allocation.references -= 1
        self._reap(allocation)
        return (OK,)

    def cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> tuple[Any, ...]:
        allocation = self.handles.get(handle)
        inside = any(start <= address and address + size <= start + length for start, length in self.reserved.items())
        if allocation is None or not inside or self._mapped_in(address, size) or offset or flags:
            return (INVALID,)
        if not self._fits(size) or address % self.granularity or size > len(allocation.data):
            return (INVALID,)
        self.mappings[address] = Mapping(allocation)
        allocation.mapped += 1
        return (OK,)

    def cuMemSetAccess(self, address: int, size: int, access: list[Any], count: int) -> tuple[Any, ...]:
        mapping = self.mappings.get(address)
        if mapping is None or len(mapping.allocation.data) != size or count != len(access):
            return (INVALID,)
        mapping.accessible = any(one.flags == 3 and one.location.type == 1 for one in access)
        return (OK,)

    def cuMemUnmap(self, address: int, size: int) -> tuple[Any, ...]:
        mapping = self.mappings.get(address)
        if mapping is None or len(mapping.allocation.data) != size:
            return (INVALID,)
        if any(address == at for queued in self.streams.values() for at, _, _ in queued):
            self.faults.append(f"unmapped {address:#x} under a memset")
        if address in self.busy:
            self.faults.append(f"unmapped {address:#x} under a kernel")
        del self.mappings[address]
        mapping.allocation.mapped -= 1
        self._reap(mapping.allocation)
        return (OK,)

    def cuMemExportToShareableHandle(self, handle: int, kind: int, flags: int) -> tuple[Any, ...]:
        if handle not in self.handles or kind != 1 or flags:
            return INVALID, None
        self.handles[handle].references += 1
        descriptor = next(self._numbers)
        self.descriptors[descriptor] = self.handles[handle]
        return OK, descriptor

    def cuMemImportFromShareableHandle(self, descriptor: int, kind: int) -> tuple[Any, ...]:
        if descriptor not in self.descriptors or kind != 1:
            return INVALID, None
        self.descriptors[descriptor].references += 1
        return OK, self._handle_of(self.descriptors[descriptor])

    def close_descriptor(self, descriptor: int) -> None:
        """What os.close does to an exported descriptor."""
        allocation = self.descriptors.pop(descriptor)
        allocation.references -= 1
        self._reap(allocation)

    def cuGetErrorName(self, error: Result) -> tuple[Any, ...]:
        return OK, error.name.encode()

    def cuGetErrorString(self, error: Result) -> tuple[Any, ...]:
        return OK, f"what {error.name} means".encode()

    def CUmemAllocationProp(self) -> Any:
        return SimpleNamespace(type=0, location=SimpleNamespace(type=0, id=-1), requestedHandleTypes=0)

    def CUmemAccessDesc(self) -> Any:
        return SimpleNamespace(location=SimpleNamespace(type=0, id=-1), flags=0)

    def _fits(self, size: int) -> bool:
        return size > 0 and size % self.granularity == 0

    def _mapped_in(self, address: int, size: int) -> bool:
        return any(
            at < address + size and address < at + len(mapping.allocation.data) for at, mapping in self.mappings.items()
        )

    def _handle_of(self, allocation: Allocation) -> int:
        handle = next(self._numbers)
        self.handles[handle] = allocation
        return handle

    def _reap(self, allocation: Allocation) -> None:
        if not allocation.references and not allocation.mapped:
            self._allocations.remove(allocation)
