"""Activations on a GPU: torch's temporary tensors in chunks of the pool that the KV cache uses too.

    op in activation_pool --> torch's MemPool --> segment: a range of addresses, chunks of the pool mapped one by one
    tensor freed          --> torch's MemPool keeps the segment for the next op
    trim                  --> torch drops its unused segments --> unmapped, their chunks given to the pool

torch asks for a segment through a C function pointer; a ctypes callback is one. Locks decide the rest:

- torch's order is GIL, then its allocator's lock: freeing a tensor from Python takes that lock while holding the GIL. A
  callback needs the GIL, so it must not run under that lock. ``release_lock_on_cudamalloc`` makes torch drop it around
  the request for a segment; nothing does around the release of one.
- So releasing is no callback: the function torch calls is a native one that does nothing, and ``trim`` sees in torch's
  snapshot which segments are gone. It also lets any thread free tensors, while the pool stays with one.
"""

import ctypes
import logging
import os
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from memory_agent.chunks import ChunkOwner, ChunkPool, PhysicalChunk
from memory_agent.errors import MemoryError_, OutOfDeviceMemory, SettingsError
from memory_agent.virtual_tensor import VirtualTensor
from memory_agent.vmm import ContractViolation, Vmm

logger = logging.getLogger(__name__)

SegmentRequest = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
"""``void* (size_t size, int device, cudaStream_t stream)``: what torch calls for a segment; NULL is "no memory"."""


class Segments:
    """Ranges of addresses that are fully backed by chunks of the pool, charged to ACTIVATION. Used by one thread at a
    time, the one that uses the pool."""

    def __init__(self, vmm: Vmm, pool: ChunkPool) -> None:
        self._vmm = vmm
        self._pool = pool
        self._live: dict[int, VirtualTensor] = {}
        self._remnants: list[VirtualTensor] = []  # given up, but an unmap or the freeing of the range was refused

    @property
    def addresses(self) -> Collection[int]:
        """First addresses of the segments; a live view."""
        return self._live.keys()

    @property
    def committed_bytes(self) -> int:
        """Bytes behind all segments, remnants included."""
        return sum(tensor.mapped_bytes for tensor in (*self._live.values(), *self._remnants))

    def allocate(self, size_bytes: int) -> int:
        """A new segment of at least ``size_bytes``; return its address.

        Raises PoolExhausted or OutOfDeviceMemory; nothing is charged then, unless the undo was refused too (a remnant).
        """
        tensor = VirtualTensor(self._vmm, size_bytes, self._pool.chunk_bytes)
        chunks: list[PhysicalChunk] = []
        try:
            chunks = self._pool.take(ChunkOwner.ACTIVATION, tensor.slot_count)
            for slot in range(tensor.slot_count):
                tensor.map_slot(slot, chunks[-1])
                chunks.pop()
        except BaseException:  # undone whatever the reason, then raised again
            self._pool.give(ChunkOwner.ACTIVATION, chunks)
            self._remnants.append(tensor)
            self._drop_remnants()
            raise
        self._live[tensor.address] = tensor
        return tensor.address

    def keep(self, addresses: Collection[int]) -> int:
        """Give up every segment that does not start at one of ``addresses``; return the bytes given to the pool.

        Nothing may use their addresses but kernels that are queued already. What the system refuses to unmap stays
        charged (logged) and is tried again by the next call.
        """
        before = self.committed_bytes
        gone = [address for address in self._live if address not in addresses]
        self._remnants.extend(self._live.pop(address) for address in gone)
        self._drop_remnants()
        return before - self.committed_bytes

    def check_conservation(self) -> None:
        """Raise ContractViolation unless exactly the segments' bytes are charged to ACTIVATION."""
        charged = self._pool.bytes_by_owner()[ChunkOwner.ACTIVATION]
        if charged != self.committed_bytes:
            raise ContractViolation(f"{charged} bytes are charged to activations, {self.committed_bytes} are mapped")
        self._pool.check_conservation()

    def _drop_remnants(self) -> None:
        for tensor in list(self._remnants):
            try:
                while tensor.mapped_slots:
                    self._pool.give(ChunkOwner.ACTIVATION, [tensor.unmap_slot(max(tensor.mapped_slots))])
                tensor.close()
            except OutOfDeviceMemory as error:
                logger.warning("%d bytes of activations stay committed: %s", tensor.mapped_bytes, error)
            else:
                self._remnants.remove(tensor)


class CudaAllocator:
    """Draws torch's activations on one GPU from a chunk pool. Used by the thread that uses the pool.

    Not for the capture of CUDA graphs, whose memory must stay; and torch's expandable segments must be off, as they
    bypass every such allocator (SettingsError).

    Args:
        vmm: of the same device; pool: a chunk pool over it; device: its ordinal.
    """

    def __init__(self, vmm: Vmm, pool: ChunkPool, device: int = 0) -> None:
        import torch

        self._torch: Any = torch  # untyped where it matters here
        self._torch.cuda.init()
        settings = _allocator_settings(torch).replace(" ", "")
        if "expandable_segments:True" in settings:
            raise SettingsError("elastic activations need expandable_segments off: unset it in PYTORCH_ALLOC_CONF")
        # The old ones again: torch resets some of those that a new text does not name.
        settings = ",".join(filter(None, (settings, "release_lock_on_cudamalloc:True")))
        self._torch._C._accelerator_setAllocatorSettings(settings)
        self._device = device
        self.segments = Segments(vmm, pool)
        self._refusal: BaseException | None = None
        # Without a cycle: a MemPool that ends whenever garbage is collected, while another one is in use, aborts.
        give = weakref.WeakMethod(self._give_segment)

        def request_segment(size_bytes: int, device: int, stream: int | None) -> int | None:
            living = give()
            return living(size_bytes, device, stream) if living is not None else None

        self._request = SegmentRequest(request_segment)  # torch keeps its bare address: it must live as long as we
        # Native, needs no GIL, ignores its arguments and touches nothing: see the module's docstring.
        request, release = (
            ctypes.cast(function, ctypes.c_void_p).value
            for function in (self._request, ctypes.pythonapi.Py_IsInitialized)
        )
        self._allocator = self._torch._C._cuda_customAllocator(request, release)
        self._mem_pool = self._new_mem_pool()

    @contextmanager
    def activation_pool(self) -> Iterator[None]:
        """Around a forward: what this thread allocates on the device is charged to the pool.

        Raises torch.OutOfMemoryError when there is no memory for a segment, caused by the PoolExhausted or
        OutOfDeviceMemory that says why; ``trim``, or a larger limit, and a new try may help. Tensors that outlive the
        block stay valid and charged.
        """
        self._refusal = None
        try:
            with self._torch.cuda.use_mem_pool(self._mem_pool, self._device):
                yield
        except self._torch.OutOfMemoryError as error:
            refusal, self._refusal = self._refusal, None
            if refusal is None:
                raise
            if isinstance(refusal, MemoryError_):
                raise error from refusal
            raise refusal from error  # a defect, or an interrupt: not a lack of memory

    def trim(self) -> int:
        """Give the memory of all segments without a living tensor to the pool, FREE; return the bytes.

        Not inside ``activation_pool``. It waits for the device when there is something to give.
        """
        self._mem_pool = self._new_mem_pool()  # the old one's end makes torch drop its unused segments
        self._torch.cuda.empty_cache()  # and those of pools that ended while tensors in them lived
        return self.segments.keep({segment["address"] for segment in self._torch.cuda.memory_snapshot()})

    def close(self) -> None:
        """Give up everything. Raises ContractViolation while tensors in the pool are alive."""
        self.trim()
        if self.segments.addresses:
            raise ContractViolation(f"tensors are alive in {len(self.segments.addresses)} segments of activations")

    def _new_mem_pool(self) -> Any:
        with self._torch.cuda.device(self._device):
            return self._torch.cuda.MemPool(self._allocator)

    def _give_segment(self, size_bytes: int, device: int, stream: int | None) -> int | None:
        """Called by torch. An exception must not reach it: it is noted, and torch gets "no memory"."""
        try:
            if device != self._device:
                raise ContractViolation(f"a segment on device {device} of a pool on device {self._device}")
            address = self.segments.allocate(size_bytes)
        except BaseException as error:  # noqa: BLE001, raised again by activation_pool
            self._refusal = error
            return None
        self._refusal = None
        return address


def _allocator_settings(torch: Any) -> str:
    """Those in force, as PYTORCH_ALLOC_CONF names them. Torch before 2.12 tells what it was started with only."""
    if tell := getattr(torch._C, "_accelerator_getAllocatorSettings", None):
        return str(tell())
    return os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
