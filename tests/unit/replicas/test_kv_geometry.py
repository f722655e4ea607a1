"""From vLLM's KV cache configurations to extents, checked against the bytes that vLLM's own views of a block touch."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVCacheTensor,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from memory_agent.errors import SettingsError
from memory_agent.extents import ExtentMap, choose_chunk_bytes
from replicas.kv_geometry import check_guarantee, kv_geometry, kv_groups
from replicas.kv_plan import KvGroup

BLOCK_TOKENS = 4
PAGES_OF_ONE_SIZE = [KVCacheLayout.LBHNC, KVCacheLayout.LBNHC, *(la for la in KVCacheLayout if la.is_block_outermost)]
PAGES_OF_SEVERAL_SIZES = [la for la in KVCacheLayout if la.is_block_outermost and la.is_block_compact]


def full(heads: int = 2, head_size: int = 8) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=heads, head_size=head_size, dtype=torch.float32)


def windowed(heads: int = 2, head_size: int = 8, window: int = 6) -> SlidingWindowSpec:
    return SlidingWindowSpec(
        block_size=BLOCK_TOKENS, num_kv_heads=heads, head_size=head_size, dtype=torch.float32, sliding_window=window
    )


def group(number: int, *specs: KVCacheSpec) -> KVCacheGroupSpec:
    """A group of a layer for each of ``specs``."""
    layers = {f"group{number}.layer{i}": spec for i, spec in enumerate(specs)}
    same = len(set(specs)) == 1
    return KVCacheGroupSpec(list(layers), specs[0] if same else UniformTypeKVCacheSpecs(BLOCK_TOKENS, layers))


def vllm_config(layout: KVCacheLayout = KVCacheLayout.LBHNC) -> Any:
    """As much of a VllmConfig as sizes a KV cache."""
    return SimpleNamespace(
        attention_config=SimpleNamespace(hisparse_config=None),
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: layout,
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=None,
        ),
        model_config=SimpleNamespace(max_model_len=1000),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        max_in_flight_tokens=100,
    )


def config_of(groups: list[KVCacheGroupSpec], layout: KVCacheLayout, bytes_: int = 30_000) -> KVCacheConfig:
    config = get_kv_cache_config_from_groups(vllm_config(layout), groups, bytes_)
    config.kv_cache_layout = layout.name
    return config


def touched_bytes(view: torch.Tensor, block: int) -> torch.Tensor:
    """Offsets in the allocation of the bytes that a layer's view of ``block`` has."""
    view.view(torch.int8)[block] = -1
    raw = torch.tensor([], dtype=torch.int8).set_(view.untyped_storage())
    offsets = raw.nonzero().flatten()
    raw.zero_()
    return offsets


def check(config: KVCacheConfig, granularity: int) -> None:
    """Every byte that vLLM can touch of a block, in any layer of any group, lies in the slots of the block's extent."""
    geometry = kv_geometry(config)
    extents = ExtentMap(geometry, choose_chunk_bytes(geometry, granularity, cap_bytes=granularity))
    assert config.kv_cache_layout is not None
    views = allocate_kv_cache(config, torch.device("cpu"), KVCacheLayout[config.kv_cache_layout])
    assert len(views) == sum(len(g.layer_names) for g in config.kv_cache_groups)
    for block in {0, 1, config.num_blocks // 2, config.num_blocks - 1}:
        slots = torch.tensor(extents.slots_of(extents.extent_of(block)))
        for view in views.values():
            offsets = touched_bytes(view, block)
            assert offsets.numel() == view[block].numel() * view.element_size()
            assert torch.isin(offsets // extents.chunk_bytes, slots).all()


@pytest.mark.parametrize("layout", PAGES_OF_ONE_SIZE)
@settings(max_examples=15, deadline=None)
@given(
    layers=st.integers(1, 4),
    windowed_layers=st.lists(st.integers(1, 4), max_size=2),
    page=st.tuples(st.integers(1, 3), st.integers(8, 16)),
    granularity=st.sampled_from([64, 512, 448]),
)
def test_any_layout_of_pages_of_one_size(
    layout: KVCacheLayout, layers: int, windowed_layers: list[int], page: tuple[int, int], granularity: int
) -> None:
    """One or several groups of any number of layers; pages that are and are not whole granules."""
    groups = [group(0, *[full(*page)] * layers)]
    groups += [group(1 + i, *[windowed(*page)] * count) for i, count in enumerate(windowed_layers)]
    check(config_of(groups, layout), granularity)


@pytest.mark.parametrize("layout", PAGES_OF_SEVERAL_SIZES)
@settings(max_examples=15, deadline=None)
@given(
    heads_of_groups=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), min_size=1, max_size=3),
    granularity=st.sampled_from([64, 512]),
)
def test_any_packing_of_pages_of_several_sizes(
    layout: KVCacheLayout, heads_of_groups: list[list[int]], granularity: int
) -> None:
    """Block-outermost groups overlay each other with different packings."""
    groups = [group(i, *[full(heads) for heads in row]) for i, row in enumerate(heads_of_groups)]
    check(config_of(groups, layout), granularity)


def test_one_group_of_several_page_sizes_layer_by_layer() -> None:
    """Layer-outermost, the regions of a group follow one another, each with its own stride."""
    config = config_of([group(0, full(1), full(3), full(1))], KVCacheLayout.LBHNC)
    assert len({region.block_stride_bytes for region in kv_geometry(config).regions}) == 2
    check(config, 512)


def test_a_block_outermost_block_is_one_piece() -> None:
    """Groups of different packings share the same blocks, so their geometry is one region."""
    config = config_of([group(0, full(1), full(2)), group(1, windowed(3))], KVCacheLayout.BLHNC)
    geometry = kv_geometry(config)
    assert len(geometry.regions) == 1
    assert geometry.regions[0].page_bytes == geometry.size_bytes // geometry.num_blocks


def test_a_layout_that_scatters_a_block_is_refused() -> None:
    """Heads outside the blocks of a layer: the message names a layout that works."""
    config = config_of([group(0, full())], KVCacheLayout.LHBNC)
    with pytest.raises(SettingsError, match=r"LHBNC.*VLLM_KV_CACHE_LAYOUT=BLHNC"):
        kv_geometry(config)


def test_caches_that_are_not_one_device_allocation_are_refused() -> None:
    """No KV cache at all, several allocations, or groups in host memory."""
    config = config_of([group(0, full())], KVCacheLayout.LBHNC)
    other = KVCacheTensor(size=1, layers=["x"], layer_stride=1, block_stride=1)
    on_host = KVCacheTensor(
        size=config.kv_cache_tensors[0].size, layers=["x"], layer_stride=1, block_stride=1, host_resident=True
    )
    for tensors in ([], [*config.kv_cache_tensors, other], [*config.kv_cache_tensors, on_host]):
        config.kv_cache_tensors = tensors
        with pytest.raises(SettingsError, match="elastic: false"):
            kv_geometry(config)


def test_a_request_takes_blocks_in_every_group() -> None:
    """All of its tokens' where attention is full, a window's and a step's where it slides."""
    config = config_of([group(0, full(), full()), group(1, windowed(window=33))], KVCacheLayout.LBHNC)
    everything, window = kv_groups(vllm_config(), config)
    assert everything == KvGroup(BLOCK_TOKENS, most_blocks=1000 // BLOCK_TOKENS)
    assert window == KvGroup(BLOCK_TOKENS, most_blocks=(32 + 100) // BLOCK_TOKENS + 1)


def test_a_guarantee_below_one_longest_request_is_refused() -> None:
    """All groups and ranks count, and vLLM's null block."""
    geometry = kv_geometry(config_of([group(0, full())], KVCacheLayout.LBHNC))
    block_bytes = geometry.size_bytes // geometry.num_blocks
    groups = (KvGroup(BLOCK_TOKENS, 10), KvGroup(BLOCK_TOKENS, 3))
    check_guarantee(groups, geometry, 2, 2 * 14 * block_bytes)
    with pytest.raises(SettingsError, match=rf"{2 * 14 * block_bytes} bytes.*max_model_len"):
        check_guarantee(groups, geometry, 2, 2 * 14 * block_bytes - 1)
