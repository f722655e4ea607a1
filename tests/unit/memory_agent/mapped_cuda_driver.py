"""FakeCudaDriver whose addresses are real: memory of this process stands behind them, as a GPU's behind a kernel's.

So tensors can be made over what CudaVmm maps, and code that would run on a GPU computes in it. An address without
memory kills, and one allocation that is mapped several times is one memory.
"""

# ruff: noqa: N802, the functions are named as the driver names them

import ctypes
import mmap
import os
from typing import Any

from tests.unit.memory_agent.fake_cuda_driver import GARBAGE, INVALID, OK, Allocation, FakeCudaDriver

_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE = 0, 0x10, 0x4000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class MappedAllocation(Allocation):
    """An allocation whose data is a memory file, full of garbage."""

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("fake-cuda")
        os.ftruncate(self.fd, size)
        self.data = mmap.mmap(self.fd, size)  # type: ignore[assignment]  # it is sliced like a bytearray
        self.data[:] = bytes([GARBAGE]) * size
        self.references, self.mapped = 1, 0


class MappedCudaDriver(FakeCudaDriver):
    """See the module. ``granularity`` is a multiple of the page size."""

    allocation = MappedAllocation

    def cuMemAddressReserve(self, size: int, alignment: int, hint: int, flags: int) -> tuple[Any, ...]:
        if not self._fits(size) or alignment & (alignment - 1) or flags:
            return INVALID, None
        start = _map(None, size + alignment, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1)
        address = -(-start // alignment) * alignment  # the margins around it stay mapped to nothing
        self.reserved[address] = size
        return OK, address

    def cuMemSetAccess(self, address: int, size: int, access: list[Any], count: int) -> tuple[Any, ...]:
        (result,) = super().cuMemSetAccess(address, size, access, count)
        mapping = self.mappings.get(address)
        if result == OK and mapping is not None and mapping.accessible:
            assert isinstance(mapping.allocation, MappedAllocation)
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            _map(address, size, protection, mmap.MAP_SHARED | _MAP_FIXED, mapping.allocation.fd)
        return (result,)

    def cuMemUnmap(self, address: int, size: int) -> tuple[Any, ...]:
        (result,) = super().cuMemUnmap(address, size)
        if result == OK:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
            _map(address, size, _PROT_NONE, flags, -1)
        return (result,)

    def _reap(self, allocation: Allocation) -> None:
        super()._reap(allocation)
        if not allocation.references and not allocation.mapped:
            assert isinstance(allocation, MappedAllocation)
            os.close(allocation.fd)


def _map(address: int | None, size: int, protection: int, flags: int, fd: int) -> int:
    got = _libc.mmap(address, size, protection, flags, fd, 0)
    assert got not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
    return int(got)
