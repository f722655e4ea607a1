"""CPU memory as a device: a sparse memory file whose pages are committed and punched out chunk by chunk.

    file     |  chunk  |  hole  |  chunk  |  chunk  |   hole ...   |     st_blocks counts the chunks alone
                  \\_________             /
    range    | none |  mapped  |  none  | mapped | none ...        |     none: PROT_NONE, a touch is SIGSEGV

A memory file instead of anonymous memory, because it can be counted from outside (``fstat`` on ``/proc/PID/fd/N``)
and because a punched page is back with the operating system at once, whatever still has it mapped.
"""

import ctypes
import errno
import mmap
import os
from bisect import bisect_left
from pathlib import Path

from memory_agent.errors import OutOfDeviceMemory, SettingsError
from memory_agent.vmm import ChunkHandle, VmmLedger

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_FALLOC_FL_KEEP_SIZE = 0x1
_FALLOC_FL_PUNCH_HOLE = 0x2
_MAP_FAILED = ctypes.c_void_p(-1).value
_BLOCK_BYTES = 512
_SPARE_MAPPINGS = 4096
"""Memory mappings left to the rest of the process: libraries, thread stacks and large allocations to come."""

# off_t is 64 bits wide on every platform that vLLM runs on.
_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_mmap.restype = ctypes.c_void_p
_munmap = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_munmap.restype = ctypes.c_int
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int


class FreeRanges:
    """The unused parts of [0, size): first fit from the bottom, neighbours merged."""

    def __init__(self, size: int) -> None:
        self._ranges = [(0, size)]  # sorted (start, end), disjoint, never touching

    def take(self, size: int) -> int | None:
        """The lowest start with room for ``size``; None when there is none."""
        for at, (start, end) in enumerate(self._ranges):
            if end - start >= size:
                self._ranges[at : at + 1] = [(start + size, end)] if end - start > size else []
                return start
        return None

    def give(self, start: int, size: int) -> None:
        """Return what ``take`` handed out."""
        end = start + size
        at = bisect_left(self._ranges, (start, end))
        first = last = at
        if at and self._ranges[at - 1][1] == start:
            first, start = at - 1, self._ranges[at - 1][0]
        if at < len(self._ranges) and self._ranges[at][0] == end:
            last, end = at + 1, self._ranges[at][1]
        self._ranges[first:last] = [(start, end)]


class HostVmm:
    """The Vmm of a host without an accelerator. See ``memory_agent.vmm.Vmm`` for the contract.

    Pages are committed by ``create``, not by the first touch, so a shortage is an error here and not a kill later.
    Only limits that the kernel reports are errors, though: a machine or a cgroup that is itself full kills a process.
    The budget must leave room for that.

    Args:
        name: shown as ``/memfd:NAME`` in the process's memory maps.
        max_bytes: most bytes of chunks alive at once.

    Raises SettingsError when the system cannot make a memory file of this size.
    """

    def __init__(self, name: str, max_bytes: int) -> None:
        if max_bytes <= 0:
            raise SettingsError(f"a memory pool of {max_bytes} bytes cannot hold anything; give it at least one page")
        self._fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._fd, max_bytes)
            self.granularity_bytes = self._probe_granularity()
            self._max_bytes = -(-max_bytes // self.granularity_bytes) * self.granularity_bytes
            os.ftruncate(self._fd, self._max_bytes)
        except (OSError, OverflowError, OutOfDeviceMemory) as error:
            os.close(self._fd)
            raise SettingsError(f"no memory file of {max_bytes} bytes: {error}; ask for less") from error
        self._free_offsets = FreeRanges(self._max_bytes)
        self._ledger = VmmLedger(self.granularity_bytes)
        self.max_mappings = _mappings_left()

    @property
    def fd(self) -> int:
        """The memory file, open in this process until ``close``: what others find under ``/proc/PID/fd``."""
        return self._fd

    def reserve(self, size_bytes: int) -> int:
        self._ledger.check_size(size_bytes)
        address = self._map_nothing(None, size_bytes)
        self._ledger.ranges[address] = size_bytes
        return address

    def free(self, address: int, size_bytes: int) -> None:
        self._ledger.check_free(address, size_bytes)
        if _munmap(address, size_bytes):
            raise _refusal(f"freeing {size_bytes} bytes of addresses")
        del self._ledger.ranges[address]

    def create(self, size_bytes: int) -> ChunkHandle:
        self._ledger.check_size(size_bytes)
        offset = self._free_offsets.take(size_bytes)
        if offset is None:
            raise OutOfDeviceMemory(
                f"no {size_bytes} bytes left of this pool's {self._max_bytes}; {self.held_bytes()} are held"
            )
        try:
            self._fallocate(0, offset, size_bytes)
        except BaseException:
            self._free_offsets.give(offset, size_bytes)
            raise
        handle = ChunkHandle(offset, size_bytes)
        self._ledger.chunks[handle] = None
        return handle

    def release(self, handle: ChunkHandle) -> None:
        self._ledger.check_release(handle)
        self._fallocate(_FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, handle.id, handle.size_bytes)
        del self._ledger.chunks[handle]
        self._free_offsets.give(handle.id, handle.size_bytes)

    def map(self, address: int, handle: ChunkHandle) -> None:
        self._ledger.check_map(address, handle)
        flags = mmap.MAP_SHARED | _MAP_FIXED
        got = _mmap(address, handle.size_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, self._fd, handle.id)
        if got == _MAP_FAILED:
            raise _refusal(f"mapping {handle.size_bytes} bytes")
        self._ledger.map(address, handle)

    def unmap(self, address: int, size_bytes: int) -> None:
        self._ledger.check_unmap(address, size_bytes)
        self._map_nothing(address, size_bytes)
        self._ledger.unmap(address)

    def held_bytes(self) -> int:
        return os.fstat(self._fd).st_blocks * _BLOCK_BYTES

    def close(self) -> None:
        if self._fd < 0:
            return
        for address, size_bytes in self._ledger.ranges.items():
            _munmap(address, size_bytes)
        self._ledger = VmmLedger(self.granularity_bytes)
        self._free_offsets = FreeRanges(0)
        os.close(self._fd)
        self._fd = -1

    def _map_nothing(self, address: int | None, size_bytes: int) -> int:
        """Put inaccessible addresses at ``address``, or where the kernel likes; return the first."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | (0 if address is None else _MAP_FIXED)
        got = _mmap(address, size_bytes, _PROT_NONE, flags, -1, 0)
        if got == _MAP_FAILED:
            raise _refusal(f"reserving {size_bytes} bytes of addresses")
        return int(got)

    def _fallocate(self, mode: int, offset: int, size_bytes: int) -> None:
        # A signal may interrupt the call; the kernel has then undone it.
        while _fallocate(self._fd, mode, offset, size_bytes):
            if ctypes.get_errno() != errno.EINTR:
                raise _refusal(f"{'releasing' if mode else 'committing'} {size_bytes} bytes")

    def _probe_granularity(self) -> int:
        """The bytes that committing one page really takes: more where the kernel backs memory files with huge pages."""
        page = mmap.PAGESIZE
        self._fallocate(0, 0, page)
        taken = self.held_bytes()
        self._fallocate(_FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, 0, taken)
        return max(page, taken)


def _refusal(what: str) -> OutOfDeviceMemory | OSError:
    """The error for the last libc call: OutOfDeviceMemory where waiting can help, OSError where it is a defect."""
    number = ctypes.get_errno()
    if number in (errno.ENOMEM, errno.ENOSPC):
        return OutOfDeviceMemory(
            f"{what}: {os.strerror(number)}; the machine's memory, this process's address space "
            "or its memory mappings (sysctl vm.max_map_count) are used up"
        )
    return OSError(number, f"{what}: {os.strerror(number)}")


def _mappings_left() -> int:
    """Memory mappings that this process may still make, less a reserve for the rest of it."""
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    taken = Path("/proc/self/maps").read_text().count("\n")
    return max(0, limit - taken - _SPARE_MAPPINGS)
