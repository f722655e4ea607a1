"""From vLLM's KV cache configuration to the pool's geometry."""

from typing import TYPE_CHECKING

from memory_agent.errors import SettingsError
from memory_agent.extents import KvGeometry, KvRegion

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig


def kv_geometry(config: "KVCacheConfig") -> KvGeometry:
    """Where each block of each layer lies in vLLM's one KV allocation.

    Raises SettingsError for a cache that is not one device allocation (host-resident groups) or has no layers.
    """
    tensors = config.kv_cache_tensors
    if not tensors:
        raise SettingsError("this model has no KV cache, so there is nothing to make elastic; set elastic: false")
    if any(tensor.host_resident for tensor in tensors) or len({tensor.size for tensor in tensors}) != 1:
        raise SettingsError(
            "this model keeps KV groups in host memory or in several allocations, which cannot be "
            "made elastic; set elastic: false"
        )
    regions = []
    for tensor in tensors:
        # A page is what one block of one layer takes: the smaller stride, whichever dimension is outermost.
        page = min(tensor.layer_stride, tensor.block_stride) if len(tensor.layers) > 1 else tensor.block_stride
        regions.append(
            KvRegion(
                offset_bytes=tensor.offset,
                layers=len(tensor.layers),
                layer_stride_bytes=tensor.layer_stride,
                block_stride_bytes=tensor.block_stride,
                page_bytes=page,
            )
        )
    return KvGeometry(size_bytes=tensors[0].size, num_blocks=config.num_blocks, regions=tuple(regions))
