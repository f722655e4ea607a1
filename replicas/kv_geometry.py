"""From vLLM's KV cache configuration to the pool's geometry, and to what a request takes of it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_utils import resolve_dcp_kv_block_size
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor
from vllm.v1.kv_cache_layout import KVCacheLayout

from memory_agent.errors import SettingsError
from memory_agent.extents import ExtentMap, KvGeometry, KvRegion
from replicas.kv_plan import KvGroup

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def kv_geometry(config: KVCacheConfig) -> KvGeometry:
    """Where each block of each layer lies in vLLM's one KV allocation.

    Several cache groups overlay each other there: a block belongs to one of them at a time, and any of them can get
    it. So an extent holds what its blocks take in the group where they take the most.

    Raises SettingsError for a cache that is not one device allocation (host-resident groups), has no layers, or a
    layout that scatters a block of a layer.
    """
    tensors = config.kv_cache_tensors
    if not tensors:
        raise SettingsError("this model has no KV cache, so there is nothing to make elastic; set elastic: false")
    if any(tensor.host_resident for tensor in tensors) or len({tensor.size for tensor in tensors}) != 1:
        raise SettingsError(
            "this model keeps KV groups in host memory or in several allocations, which cannot be "
            "made elastic; set elastic: false"
        )
    assert config.kv_cache_layout is not None  # settled by vLLM before it makes a KV cache
    layout = KVCacheLayout[config.kv_cache_layout]
    regions = dict.fromkeys(_region(tensor, layout) for tensor in tensors)
    return KvGeometry(size_bytes=tensors[0].size, num_blocks=config.num_blocks, regions=tuple(regions))


def kv_groups(vllm_config: "VllmConfig", config: KVCacheConfig) -> tuple[KvGroup, ...]:
    """The model's cache groups: a request has a table of KV blocks in each."""
    ranks = vllm_config.parallel_config.decode_context_parallel_size
    specs = [group.kv_cache_spec for group in config.kv_cache_groups]
    return tuple(
        KvGroup(
            block_tokens=resolve_dcp_kv_block_size(spec, ranks),
            most_blocks=-(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes),
        )
        for spec in specs
    )


def check_guarantee(groups: Sequence[KvGroup], geometry: KvGeometry, ranks: int, guarantee_bytes: int) -> None:
    """Raises SettingsError unless one longest request, beside vLLM's null block, fits into the KV bytes, over all
    ``ranks``, that the engine can always get: else it could wait for ever."""
    blocks = 1 + sum(group.most_blocks for group in groups)
    needed = blocks * (geometry.size_bytes // geometry.num_blocks) * ranks
    if needed > guarantee_bytes:
        raise SettingsError(
            f"one longest request takes {blocks - 1} KV blocks in the {len(groups)} KV cache groups of this model, "
            f"{needed} bytes with vLLM's null block, but only {guarantee_bytes} are guaranteed to it: lower "
            "max_model_len, or set elastic: false"
        )


def check_extents(groups: Sequence[KvGroup], extents: ExtentMap, ranks: int, guarantee_bytes: int) -> None:
    """As ``check_guarantee``, in the whole extents in which memory is mapped: only the workers tell how large they
    are."""
    needed = extents.bytes_for(1 + sum(group.most_blocks for group in groups)) * ranks
    if needed > guarantee_bytes:
        raise SettingsError(
            f"one longest request takes {needed} bytes of KV memory in extents of {extents.extent_bytes} bytes, only "
            f"{guarantee_bytes} are guaranteed to it: lower max_model_len, or set elastic: false"
        )


def _region(tensor: KVCacheTensor, layout: KVCacheLayout) -> KvRegion:
    if layout.is_block_outermost:
        # Whatever lies inside a block, in whatever order, belongs to the block.
        return KvRegion(0, 1, tensor.block_stride, tensor.block_stride, tensor.block_stride)
    if not layout.is_block_compact:
        raise SettingsError(
            f"the KV cache layout {layout.name} scatters the heads of a block over the cache, which cannot be made "
            "elastic; set VLLM_KV_CACHE_LAYOUT=BLHNC, or elastic: false"
        )
    return KvRegion(tensor.offset, len(tensor.layers), tensor.layer_stride, tensor.block_stride, tensor.block_stride)
