"""GPU memory as a device: ranges, allocations and mappings of the CUDA driver's virtual memory management.

    reserve   cuMemAddressReserve
    create    cuMemCreate, then cleared through a window of addresses that only this module uses
    map       cuMemMap, cuMemSetAccess
    unmap     cuCtxSynchronize, cuMemUnmap
    release   cuMemRelease

The driver does not promise cleared memory, so ``create`` clears it. ``cuMemUnmap`` does not wait for kernels in all
cases, so ``unmap`` does. Both wait for the device: neither may be called while a CUDA graph is being captured.
"""

import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from memory_agent.errors import OutOfDeviceMemory, SettingsError
from memory_agent.vmm import ChunkHandle, ContractViolation, VmmLedger

logger = logging.getLogger(__name__)


class CudaError(RuntimeError):
    """The driver refused for a reason that waiting does not cure: a defect, or a context that a kernel has broken."""


def load_driver() -> Any:
    """The CUDA driver API of cuda-python. Raises SettingsError where it is not installed."""
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise SettingsError("CUDA memory needs cuda-python: pip install 'ellm-cluster[gpu]'") from error


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
        self._driver = load_driver() if driver is None else driver
        self._closed = True
        self._imported: set[ChunkHandle] = set()
        self._window = 0
        self._window_bytes = 0
        self._in_window: ChunkHandle | None = None
        try:
            self._call("cuInit", 0)
            self._device = self._call("cuDeviceGet", device)
            self._check_device(device)
            self._properties, self._access = self._describe(device)
            minimum = self._driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
            self.granularity_bytes = int(self._call("cuMemGetAllocationGranularity", self._properties, minimum))
            self._ledger = VmmLedger(self.granularity_bytes)
            self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        except (RuntimeError, OutOfDeviceMemory) as error:  # RuntimeError is also cuda-python's "no driver library"
            raise SettingsError(f"CUDA device {device} cannot be used: {error}; see what nvidia-smi lists") from error
        try:
            with self._current_context():
                # Non-blocking: clearing a chunk does not wait for the kernels of the legacy default stream.
                self._stream = self._call("cuStreamCreate", int(self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        except BaseException:  # undone whatever the reason, then raised again
            self._quietly("cuDevicePrimaryCtxRelease", self._device)
            raise
        self._closed = False

    def reserve(self, size_bytes: int) -> int:
        self._ledger.check_size(size_bytes)
        address = self._reserve(size_bytes)
        self._ledger.ranges[address] = size_bytes
        return address

    def free(self, address: int, size_bytes: int) -> None:
        self._ledger.check_free(address, size_bytes)
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
        self._ledger.check_map(address, handle)
        with self._current_context():
            self._map(address, handle)
        self._ledger.map(address, handle)

    def unmap(self, address: int, size_bytes: int) -> None:
        """As the contract says. Waits for everything this process has queued on the device: work that was queued before
        may still use the addresses."""
        self._ledger.check_unmap(address, size_bytes)
        with self._current_context():
            self._call("cuCtxSynchronize")
            self._call("cuMemUnmap", address, size_bytes)
        self._ledger.unmap(address)

    def held_bytes(self) -> int:
        """Bytes of the driver's allocations that this backend has created and not released. The driver commits them
        whole, but tells nobody how many are one process's: cuMemGetInfo counts the device. Imported chunks count where
        they were created."""
        held = [handle for handle in self._ledger.chunks if handle not in self._imported]
        return sum(handle.size_bytes for handle in (*held, *([self._in_window] if self._in_window else [])))

    def device_bytes(self) -> tuple[int, int]:
        """(free, total) bytes of the device, all processes together."""
        with self._current_context():
            free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

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
        return self._driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR

    def _check_device(self, device: int) -> None:
        attributes = self._driver.CUdevice_attribute
        for needed in (
            attributes.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
            attributes.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
        ):
            if not self._call("cuDeviceGetAttribute", needed, self._device):
                raise SettingsError(f"CUDA device {device} lacks {needed.name}: its memory cannot be mapped in chunks")

    def _describe(self, device: int) -> tuple[Any, Any]:
        """(what cuMemCreate makes: pinned device memory that can be exported, who may access it: the device)."""
        driver = self._driver
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

    def _call(self, name: str, *args: Any) -> Any:
        """One driver call: its result, a tuple where there are several, None where there is none."""
        error, *results = getattr(self._driver, name)(*args)
        codes = self._driver.CUresult
        if error == codes.CUDA_SUCCESS:
            return results[0] if len(results) == 1 else tuple(results) or None
        message = f"{name}: {self._text('cuGetErrorName', error)}, {self._text('cuGetErrorString', error)}"
        if error == codes.CUDA_ERROR_OUT_OF_MEMORY:
            raise OutOfDeviceMemory(f"{message}; the device's memory or this process's address space is used up")
        raise CudaError(message)

    def _text(self, name: str, error: Any) -> str:
        found, text = getattr(self._driver, name)(error)
        return text.decode() if found == self._driver.CUresult.CUDA_SUCCESS and text else f"error {int(error)}"

    def _quietly(self, name: str, *args: Any) -> None:
        """A driver call of ``close``: what it cannot give back goes with the process."""
        try:
            self._call(name, *args)
        except (CudaError, OutOfDeviceMemory) as error:
            logger.warning("closing CUDA memory: %s", error)
