"""What memory a worker's KV cache lies on: the host's, or that of its GPU."""

import ctypes
from typing import Any, Protocol

import numpy as np
import torch
from vllm.platforms import current_platform

from memory_agent.chunks import ChunkPool
from memory_agent.cuda_allocator import CudaAllocator
from memory_agent.cuda_vmm import CHUNK_GRANULES, CudaVmm
from memory_agent.extents import KvGeometry
from memory_agent.host_vmm import HostVmm
from memory_agent.lease_board import NO_FD
from memory_agent.virtual_tensor import VirtualTensor
from memory_agent.vmm import Vmm
from replicas.kv_blocks import HostBlocks, KvBlocks, StagedBlocks


class KvDevice(Protocol):
    """The memory under one KV tensor."""

    @property
    def vmm(self) -> Vmm: ...

    @property
    def chunk_bytes(self) -> tuple[int, int]:
        """The smallest and the largest chunk wanted."""
        ...

    @property
    def memory_fd(self) -> int:
        """Descriptor of the file that backs the memory; NO_FD where none does."""
        ...

    @property
    def spare_bytes(self) -> int:
        """What others than the KV cache may take of the same chunk pool at most."""
        ...

    def back(self, tensor: VirtualTensor) -> None:
        """Make slots without a chunk bear the touches that the device's kernels allow themselves."""
        ...

    def tensor(self, address: int, size_bytes: int) -> torch.Tensor:
        """The bytes from ``address`` on as an int8 tensor on the device; whoever uses it keeps them reserved."""
        ...

    def blocks(self, address: int, geometry: KvGeometry) -> KvBlocks:
        """Access to the content of the blocks of the KV tensor that begins at ``address``."""
        ...

    def check(self) -> None:
        """Raise ContractViolation where the device's own count contradicts the backend's."""
        ...

    def end_warm_up(self) -> None:
        """Forget what kernels wrote to slots without a chunk. Waits for those that are queued."""
        ...


class HostDevice:
    """Host memory. Kernels touch mapped blocks alone, and what the backend holds is the operating system's count."""

    spare_bytes = 0
    chunk_bytes = 0, 4 << 20

    def __init__(self, vmm: HostVmm) -> None:
        self.vmm = vmm
        self.memory_fd = vmm.fd

    def back(self, tensor: VirtualTensor) -> None:
        """A stray touch dies."""

    def tensor(self, address: int, size_bytes: int) -> torch.Tensor:
        return torch.frombuffer((ctypes.c_int8 * size_bytes).from_address(address), dtype=torch.int8)

    def blocks(self, address: int, geometry: KvGeometry) -> KvBlocks:
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * geometry.size_bytes).from_address(address))
        return HostBlocks(memory, geometry)

    def check(self) -> None:
        """It is one count."""

    def end_warm_up(self) -> None:
        """Nothing was written."""


class CudaDevice:
    """The memory of one NVIDIA GPU, in chunks of a few of the driver's granules.

    Args:
        ordinal: as CUDA counts; driver: as for CudaVmm; torch_device: of the tensors, by default that GPU.

    Raises SettingsError where the process cannot use it.
    """

    memory_fd = NO_FD

    def __init__(self, ordinal: int, driver: Any = None, torch_device: torch.device | None = None) -> None:
        self._ordinal = ordinal
        self.vmm = CudaVmm(ordinal, driver)
        least, most = CHUNK_GRANULES
        self.chunk_bytes = least * self.vmm.granularity_bytes, most * self.vmm.granularity_bytes
        self.spare_bytes = self.vmm.device_bytes()[1]
        self._torch_device = torch_device or torch.device("cuda", ordinal)

    def back(self, tensor: VirtualTensor) -> None:
        self.vmm.back(tensor.address, tensor.slot_count * tensor.chunk_bytes, tensor.chunk_bytes)

    def tensor(self, address: int, size_bytes: int) -> torch.Tensor:
        # What torch itself makes tensors over a CUDA graph's memory with.
        storage = torch._C._construct_storage_from_data_pointer(address, self._torch_device, size_bytes)
        return torch.empty(0, dtype=torch.int8, device=self._torch_device).set_(storage)

    def blocks(self, address: int, geometry: KvGeometry) -> KvBlocks:
        return StagedBlocks(self.tensor(address, geometry.size_bytes), geometry)

    def allocator(self, pool: ChunkPool) -> CudaAllocator:
        """Torch's way to take its tensors from ``pool``, which is over this device. Raises SettingsError."""
        return CudaAllocator(self.vmm, pool, self._ordinal)

    def check(self) -> None:
        self.vmm.check_device()

    def end_warm_up(self) -> None:
        self.vmm.clear_scratch()


def worker_device() -> KvDevice | None:
    """What the worker of this process computes on: its GPU; None for the host. Raises SettingsError."""
    return CudaDevice(torch.cuda.current_device()) if current_platform.is_cuda() else None
