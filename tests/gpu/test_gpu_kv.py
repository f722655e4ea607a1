"""An elastic KV cache under a small transformer: memory comes and goes between steps, the tokens stay the same."""

import torch
from gpu_memory import DEVICE, view

from memory_agent.balloon import Balloon
from memory_agent.chunks import ChunkPool
from memory_agent.cuda_vmm import CudaVmm
from memory_agent.extents import ExtentMap
from memory_agent.virtual_tensor import VirtualTensor
from tests.tiny_transformer import GEOMETRY, SHAPE, SIZE_BYTES, ElasticCache, elastic_equals_plain


def test_tokens_are_those_of_a_plain_cache(vmm: CudaVmm) -> None:
    """Prefill and decode over a cache whose memory comes and goes every step give the tokens of a cache that stays."""
    chunk_bytes = vmm.granularity_bytes
    extents = ExtentMap(GEOMETRY, chunk_bytes)
    tensor = VirtualTensor(vmm, SIZE_BYTES, chunk_bytes)
    balloon = Balloon(ChunkPool(vmm, chunk_bytes, limit_chunks=SIZE_BYTES // chunk_bytes), tensor, extents)
    kv = view(tensor.address, SHAPE, torch.float32, DEVICE)
    cache = ElasticCache(
        kv, extents, balloon.inflate_kv, balloon.deflate_kv, lambda: balloon.mapped, balloon.check_conservation
    )
    elastic_equals_plain(cache, new=120)
    balloon.deflate_kv(list(balloon.mapped))
    assert vmm.held_bytes() == 0
    tensor.close()
