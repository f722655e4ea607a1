"""GPU memory as a device: ranges, allocations and mappings of the CUDA driver's virtual memory management.

    reserve   cuMemAddressReserve
    create    cuMemCreate, then cleared through a window of addresses that only this module uses
    map       cuMemMap, cuMemSetAccess
    unmap     cuCtxSynchronize, cuMemUnmap
    release   cuMemRelease

The driver does not promise cleared memory, so ``create`` clears it. ``cuMemUnmap`` does not wait for kernels in all
cases, so ``unmap`` does. Both wait for the device: neither may be called while a CUDA graph is being captured.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from memory_agent.cuda_driver import CudaDriver
from memory_agent.cuda_scratch import Scratch
from memory_agent.errors import OutOfDeviceMemory, SettingsError
from memory_agent.vmm import ChunkHandle, ContractViolation, VmmLedger

CHUNK_GRANULES = 8, 16
"""Granules of the smallest and of the largest chunk that a KV cache is divided into. A call of the driver takes as long
for 32 MiB as for 2: on an H200 about 95 us to create and clear a chunk, 70 to map it, 65 to unmap it, 25 to release
it."""


class CudaVmm:
    """The Vmm of one NVIDIA GPU. See ``memory_agent.vmm.Vmm`` for the contract; where waiting cannot help, the calls
    raise CudaError.

    It lives in the device's primary context, the one that torch uses, so torch's kernels see what it maps.

    Args:
        device: the ordinal as CUDA counts, after CUDA_VISIBLE_DEVICES.
        driver: what answers the driver API: cuda-python's module, or an object that looks like it.

    Raises SettingsError when this process cannot use the device.
    """

    max_mappings = sys.maxsize  # the driver documents no bound

    def __init__(self, device: int = 0, driver: Any = None) -> None:
        self._driver = CudaDriver(driver)
        self._call, self._quietly = self._driver.call, self._driver.quietly
        self._closed = True
        self._imported: set[ChunkHandle] = set()
        self._window = 0
        self._window_bytes = 0
        self._in_window: ChunkHandle | None = None
        self._scratch: Scratch | None = None
        try:
            self._call("cuInit", 0)
            self._device = self._call("cuDeviceGet", device)
            self._check_device(device)
            self._properties, self._access = self._describe(device)
            minimum = self._driver.api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
            self.granularity_bytes = int(self._call("cuMemGetAllocationGranularity", self._properties, minimum))
            self._ledger = VmmLedger(self.granularity_bytes)
            self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        except (RuntimeError, OutOfDeviceMemory) as error:  # RuntimeError is also cuda-python's "no driver library"
            raise SettingsError(f"CUDA device {device} cannot be used: {error}; see what nvidia-smi lists") from error
        try:
            with self._current_context():
                # Non-blocking: clearing a chunk does not wait for the kernels of the legacy default stream.
                self._stream = self._call("cuStreamCreate", int(self._driver.api.CUstream_flags.CU_STREAM_NON_BLOCKING))
        except BaseException:  # undone whatever the reason, then raised again
            self._quietly("cuDevicePrimaryCtxRelease", self._device)
            raise
        self._closed = False

    def reserve(self, size_bytes: int) -> int:
        self._ledger.check_size(size_bytes)
        address = self._reserve(size_bytes)
        self._ledger.ranges[address] = size_bytes
        return address

    def back(self, address: int, size_bytes: int, slot_bytes: int) -> None:
        """Show one scratch chunk, zeroed, in every slot of this reserved range that has no chunk, now and from now on
        (``memory_agent.cuda_scratch``).

        One range of a backend can be backed, before anything is mapped into it; chunks for it are of ``slot_bytes``, at
        slots of that size. Raises OutOfDeviceMemory; then ``close`` is all that is left to do.
        """
        if self._scratch is not None or self._ledger.ranges.get(address) != size_bytes or size_bytes % slot_bytes:
            raise ContractViolation(f"no range of {size_bytes} bytes at {address:#x} that slots of {slot_bytes} fill")
        chunk = self.create(slot_bytes)
        del self._ledger.chunks[chunk]  # nobody's
        slots = range(address, address + size_bytes, slot_bytes)
        self._scratch = Scratch(self._driver, chunk, slots, self._map)
        with self._current_context():
            for slot in slots:
                self._scratch.show(slot)

    def clear_scratch(self) -> None:
        """Zero what was written where no chunk is, by kernels that are queued too."""
        if self._scratch is not None:
            with self._current_context():
                self._call("cuCtxSynchronize")
            self._clear(self._scratch.chunk)

    def free(self, address: int, size_bytes: int) -> None:
        self._ledger.check_free(address, size_bytes)
        if self._scratch is not None and address in self._scratch.slots:
            with self._current_context():
                self._call("cuCtxSynchronize")
                self._scratch.close()
            self._scratch = None
        self._call("cuMemAddressFree", address, size_bytes)
        del self._ledger.ranges[address]

    def create(self, size_bytes: int) -> ChunkHandle:
        self._ledger.check_size(size_bytes)
        handle = ChunkHandle(int(self._call("cuMemCreate", size_bytes, self._properties, 0)), size_bytes)
        try:
            self._clear(handle)
        except BaseException:  # undone whatever the reason, then raised again
            self._call("cuMemRelease", handle.id)
            raise
        self._ledger.chunks[handle] = None
        return handle

    def release(self, handle: ChunkHandle) -> None:
        """As the contract says, but for a chunk that was exported: its memory stays until every descriptor and every
        import of it is closed too."""
        self._ledger.check_release(handle)
        self._call("cuMemRelease", handle.id)
        del self._ledger.chunks[handle]
        self._imported.discard(handle)

    def map(self, address: int, handle: ChunkHandle) -> None:
        """As the contract says. In a backed range it waits for the device, as ``unmap`` does."""
        self._ledger.check_map(address, handle)
        with self._current_context():
            if self._scratch is not None:
                self._scratch.hide(address)
            try:
                self._map(address, handle)
            except BaseException:  # undone whatever the reason, then raised again
                if self._scratch is not None:
                    self._scratch.show_again(address)
                raise
        self._ledger.map(address, handle)

    def unmap(self, address: int, size_bytes: int) -> None:
        """As the contract says. Waits for everything this process has queued on the device: work that was queued before
        may still use the addresses."""
        self._ledger.check_unmap(address, size_bytes)
        with self._current_context():
            self._call("cuCtxSynchronize")
            self._call("cuMemUnmap", address, size_bytes)
            self._ledger.unmap(address)
            if self._scratch is not None:
                self._scratch.show_again(address)

    def held_bytes(self) -> int:
        """Bytes of the driver's allocations that this backend has created and not released. The driver commits them
        whole, but tells nobody how many are one process's: cuMemGetInfo counts the device. Imported chunks count where
        they were created; the scratch chunk counts nowhere."""
        held = [handle for handle in self._ledger.chunks if handle not in self._imported]
        return sum(handle.size_bytes for handle in (*held, *([self._in_window] if self._in_window else [])))

    def device_bytes(self) -> tuple[int, int]:
        """(free, total) bytes of the device, all processes together."""
        with self._current_context():
            free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    def check_device(self) -> None:
        """Raise ContractViolation where the device counts less memory taken, by all processes, than this backend holds:
        then ``held_bytes`` is wrong."""
        free, total = self.device_bytes()
        if total - free < self.held_bytes():
            raise ContractViolation(f"{self.held_bytes()} bytes are held, the device counts {total - free} taken")

    def export_fd(self, handle: ChunkHandle) -> int:
        """A file descriptor that stands for a living chunk, for another process on this host; the caller closes it."""
        if handle not in self._ledger.chunks:
            raise ContractViolation(f"{handle} is not alive")
        return int(self._call("cuMemExportToShareableHandle", handle.id, self._handle_type, 0))

    def import_fd(self, fd: int, size_bytes: int) -> ChunkHandle:
        """The chunk of ``size_bytes`` that another process exported: the same memory, not cleared. ``fd`` stays the
        caller's. Its ``release`` drops this process's hold on it."""
        self._ledger.check_size(size_bytes)
        handle = ChunkHandle(int(self._call("cuMemImportFromShareableHandle", fd, self._handle_type)), size_bytes)
        if handle in self._ledger.chunks:
            self._call("cuMemRelease", handle.id)
            raise ContractViolation(f"{handle} is this backend's own or was imported before")
        self._ledger.chunks[handle] = None
        self._imported.add(handle)
        return handle

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._quietly("cuCtxPushCurrent", self._context)
        self._quietly("cuCtxSynchronize")
        for handle, address in self._ledger.chunks.items():
            if address is not None:
                self._quietly("cuMemUnmap", address, handle.size_bytes)
            self._quietly("cuMemRelease", handle.id)
        if self._in_window is not None:
            self._quietly("cuMemUnmap", self._window, self._in_window.size_bytes)
            self._in_window = None
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None
        if self._window_bytes:
            self._quietly("cuMemAddressFree", self._window, self._window_bytes)
        for address, size_bytes in self._ledger.ranges.items():
            self._quietly("cuMemAddressFree", address, size_bytes)
        self._quietly("cuStreamDestroy", self._stream)
        self._quietly("cuCtxPopCurrent")
        self._quietly("cuDevicePrimaryCtxRelease", self._device)
        self._ledger = VmmLedger(self.granularity_bytes)
        self._imported.clear()

    @property
    def _handle_type(self) -> Any:
        return self._driver.api.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR

    def _check_device(self, device: int) -> None:
        attributes = self._driver.api.CUdevice_attribute
        for needed in (
            attributes.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
            attributes.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
        ):
            if not self._call("cuDeviceGetAttribute", needed, self._device):
                raise SettingsError(f"CUDA device {device} lacks {needed.name}: its memory cannot be mapped in chunks")

    def _describe(self, device: int) -> tuple[Any, Any]:
        """(what cuMemCreate makes: pinned device memory that can be exported, who may access it: the device)."""
        driver = self._driver.api
        on_device = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties = driver.CUmemAllocationProp()
        properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = on_device
        properties.location.id = device
        properties.requestedHandleTypes = self._handle_type
        access = driver.CUmemAccessDesc()
        access.location.type = on_device
        access.location.id = device
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        return properties, access

    def _reserve(self, size_bytes: int) -> int:
        return int(self._call("cuMemAddressReserve", size_bytes, self.granularity_bytes, 0, 0))

    def _map(self, address: int, handle: ChunkHandle) -> None:
        self._call("cuMemMap", address, handle.size_bytes, 0, handle.id, 0)
        try:
            self._call("cuMemSetAccess", address, handle.size_bytes, [self._access], 1)
        except BaseException:  # undone whatever the reason, then raised again
            self._call("cuMemUnmap", address, handle.size_bytes)
            raise

    def _clear(self, handle: ChunkHandle) -> None:
        """Fill an unmapped chunk with zeros; when it returns, the device has written them."""
        with self._current_context():
            self._empty_window()
            if self._window_bytes < handle.size_bytes:
                window = self._reserve(handle.size_bytes)
                if self._window_bytes:
                    self._call("cuMemAddressFree", self._window, self._window_bytes)
                self._window, self._window_bytes = window, handle.size_bytes
            self._map(self._window, handle)
            self._in_window = handle
            try:
                self._call("cuMemsetD8Async", self._window, 0, handle.size_bytes, self._stream)
                self._call("cuStreamSynchronize", self._stream)
            finally:
                self._empty_window()

    def _empty_window(self) -> None:
        """Unmap what is in the window. If the driver refuses, it stays there, committed, until the next ``create``."""
        if self._in_window is not None:
            self._call("cuMemUnmap", self._window, self._in_window.size_bytes)
            self._in_window = None

    @contextmanager
    def _current_context(self) -> Iterator[None]:
        """Make the primary context the calling thread's: a thread that torch has not used has none."""
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")
