"""The connector of an engine on a GPU, for vLLM's CPU build: its KV memory is that of the CUDA backend, over a driver
in Python with real memory behind its addresses. What only a GPU has is missing: kernels that are queued, torch's pools.
"""

import torch

from memory_agent.cuda_vmm import CHUNK_GRANULES
from replicas import elastic_connector
from replicas.kv_device import CudaDevice
from replicas.kv_memory import KvAllocation, KvMemory
from tests.unit.memory_agent.mapped_cuda_driver import MappedCudaDriver

CHUNK = 64 << 10
"""Of the KV cache: as many of the driver's granules as on a GPU."""
CAPACITY = 256 << 20


class ElasticKVConnector(elastic_connector.ElasticKVConnector):
    """Chosen by vLLM's ``kv_connector_module_path``."""

    def get_mem_pool_context(self) -> KvAllocation:
        device = CudaDevice(0, MappedCudaDriver(CHUNK // CHUNK_GRANULES[0], CAPACITY), torch.device("cpu"))
        self._memory = KvMemory(self.geometry, self.settings.rest_bytes, device)
        return self._memory.allocation()
