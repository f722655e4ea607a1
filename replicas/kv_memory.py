"""A worker's KV memory: vLLM's KV tensor on a virtual range, of which only some extents have physical memory."""

import time
from functools import cached_property
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from memory_agent.balloon import Balloon
from memory_agent.chunks import ChunkPool
from memory_agent.errors import MemoryError_
from memory_agent.extents import ExtentMap, KvGeometry, choose_chunk_bytes
from memory_agent.host_vmm import HostVmm
from memory_agent.virtual_tensor import VirtualTensor
from memory_agent.vmm import ContractViolation
from replicas.kv_blocks import KvBlocks
from replicas.kv_device import HostDevice, KvDevice
from replicas.kv_moves import KvAck, KvMoves


class KvMemory:
    """One worker's KV tensor and the balloon under it.

    Args:
        geometry: of vLLM's one KV allocation.
        rest_bytes: mapped from the start; at least the extent of block 0, vLLM's null block.
        device: that it lies on, by default the host.

    Attributes:
        pool: chunks of the device, which the worker's activations may draw from too.

    Raises:
        OutOfDeviceMemory: the rest could not be mapped.
    """

    def __init__(self, geometry: KvGeometry, rest_bytes: int, device: KvDevice | None = None) -> None:
        # Room for the last slot, rounded up to a chunk; only committed bytes count.
        self.device = device or HostDevice(HostVmm("ellm-kv", geometry.size_bytes + HostDevice.chunk_bytes[1]))
        vmm, (least, largest) = self.device.vmm, self.device.chunk_bytes
        least = max(least, -(-geometry.size_bytes // vmm.max_mappings))
        self.chunk_bytes = choose_chunk_bytes(geometry, vmm.granularity_bytes, largest, floor_bytes=least)
        self.fd = self.device.memory_fd
        self._geometry = geometry
        self._extents = ExtentMap(geometry, self.chunk_bytes)
        # The lease bounds what is mapped, in the scheduler; the pool only has to be able to hold all of it.
        slots = -(-geometry.size_bytes // self.chunk_bytes)
        spare = self.device.spare_bytes // self.chunk_bytes
        self.pool = ChunkPool(vmm, self.chunk_bytes, limit_chunks=slots + spare)
        self._tensor = VirtualTensor(vmm, slots * self.chunk_bytes, self.chunk_bytes)
        self.device.back(self._tensor)
        self._balloon = Balloon(self.pool, self._tensor, self._extents)
        self._adopted = False
        rest = max(1, rest_bytes // self._extents.extent_bytes)
        self._balloon.inflate_kv(range(min(rest, self._extents.count)))

    @property
    def mapped(self) -> set[int]:
        return set(self._balloon.mapped)

    def apply(self, moves: KvMoves) -> KvAck:
        """Unmap, then map, all or nothing. Never raises for lack of memory: the answer says so, and what a check of the
        books finds after an undo, or where ``moves`` asks for one."""
        began = unmapped = time.perf_counter()
        error = None
        try:
            self._balloon.deflate_kv(moves.unmap)
            unmapped = time.perf_counter()
            self._balloon.inflate_kv(moves.map)
        except MemoryError_ as failure:
            error = str(failure)
        unmap_s, map_s = unmapped - began, time.perf_counter() - unmapped
        imbalance = None
        if error is not None or moves.check is not None:
            imbalance = self._imbalance(moves.check if error is None else None)
        return KvAck(moves.sequence, error, unmap_s, map_s, imbalance)

    def check_conservation(self) -> None:
        """Raise ContractViolation unless extents, slots, chunks and the system's count agree."""
        self._balloon.check_conservation()
        self.device.check()

    def end_warm_up(self) -> None:
        """vLLM has warmed up, and may have touched any block of a cache that nobody uses yet."""
        self.device.end_warm_up()

    def _imbalance(self, extents: int | None) -> str | None:
        """What is wrong with the books, and with the number of mapped extents where one is expected."""
        mapped = len(self._balloon.mapped)
        if extents not in (None, mapped):
            return f"the worker has mapped {mapped} extents, the scheduler counts {extents}"
        try:
            self.check_conservation()
        except ContractViolation as violation:
            return str(violation)
        return None

    def allocation(self) -> "KvAllocation":
        """A context in which vLLM's one KV allocation is answered with this memory."""
        return KvAllocation(self)

    def adopt(self) -> torch.Tensor:
        """The KV tensor, int8, of the geometry's size; reads as zero where mapped."""
        self._adopted = True
        return self.device.tensor(self._tensor.address, self._geometry.size_bytes)

    @cached_property
    def blocks(self) -> KvBlocks:
        """The content of blocks whose extents are mapped."""
        return self.device.blocks(self._tensor.address, self._geometry)

    def require_adopted(self) -> None:
        """Raises RuntimeError unless vLLM's KV cache lies on this memory."""
        if not self._adopted:
            raise RuntimeError(
                "vLLM allocated its KV cache in another way than torch.zeros of "
                f"{self._geometry.size_bytes} int8: this version cannot be made elastic"
            )

    def answers(self, size: Any, dtype: Any) -> bool:
        """Is this torch.zeros call vLLM's KV allocation?"""
        return (
            not self._adopted
            and dtype is torch.int8
            and size in (self._geometry.size_bytes, (self._geometry.size_bytes,), [self._geometry.size_bytes])
        )


class KvAllocation(TorchFunctionMode):
    """Answers the single ``torch.zeros`` of vLLM's ``allocate_kv_cache`` and lets every other call through."""

    def __init__(self, memory: KvMemory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.zeros and args and self._memory.answers(args[0], kwargs.get("dtype")):
            return self._memory.adopt()
        return func(*args, **kwargs)
