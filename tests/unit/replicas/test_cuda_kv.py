"""A worker's KV memory on a GPU, over a driver in Python with real memory behind its addresses: no GPU is needed."""

from collections.abc import Iterable
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_agent.chunks import ChunkOwner
from memory_agent.cuda_vmm import CHUNK_GRANULES
from memory_agent.extents import ExtentMap, KvGeometry, KvRegion
from memory_agent.lease_board import NO_FD
from replicas.kv_device import CudaDevice
from replicas.kv_memory import KvMemory
from replicas.kv_moves import KvMoves
from tests.tiny_transformer import GEOMETRY, SHAPE, ElasticCache, elastic_equals_plain
from tests.unit.memory_agent.fake_cuda_driver import Result
from tests.unit.memory_agent.mapped_cuda_driver import MappedCudaDriver

CHUNK, BLOCKS = 16384, 12
BLOCK_BY_BLOCK = KvGeometry(BLOCKS * CHUNK, BLOCKS, (KvRegion(0, 1, CHUNK, CHUNK, CHUNK),))
LAYER_BY_LAYER = KvGeometry(2 * BLOCKS * CHUNK, BLOCKS, (KvRegion(0, 2, BLOCKS * CHUNK, CHUNK, CHUNK),))
SHARED_CHUNKS = KvGeometry(BLOCKS * 10_000, BLOCKS, (KvRegion(0, 1, 10_000, 10_000, 10_000),))


def on_gpu(geometry: KvGeometry, driver: MappedCudaDriver, rest_bytes: int = 0) -> KvMemory:
    return KvMemory(geometry, rest_bytes, CudaDevice(0, driver, torch.device("cpu")))


@pytest.fixture
def driver() -> MappedCudaDriver:
    return MappedCudaDriver(CHUNK // CHUNK_GRANULES[0], 64 * CHUNK)


def test_the_allocation_of_vllm_is_answered_with_the_gpus_memory(driver: MappedCudaDriver) -> None:
    """torch.zeros of the KV cache's size is the range: zeros, in chunks of a few granules, without a file."""
    memory = on_gpu(BLOCK_BY_BLOCK, driver, rest_bytes=3 * CHUNK)
    with memory.allocation():
        kv = torch.zeros(BLOCK_BY_BLOCK.size_bytes, dtype=torch.int8, device=torch.device("cpu"))
        other = torch.zeros(BLOCK_BY_BLOCK.size_bytes, dtype=torch.int8, device=torch.device("cpu"))
    memory.require_adopted()
    assert not kv.any() and kv.data_ptr() != other.data_ptr()
    assert (memory.chunk_bytes, memory.fd, memory.mapped) == (CHUNK, NO_FD, {0, 1, 2})
    kv.view(BLOCKS, CHUNK)[1].fill_(7)
    memory.apply(KvMoves(sequence=1, unmap=[0], map=[5]))
    assert (kv.view(BLOCKS, CHUNK)[1] == 7).all() and not kv.view(BLOCKS, CHUNK)[5].any()
    memory.check_conservation()


def test_a_block_without_memory_can_be_touched_and_is_nobodys(driver: MappedCudaDriver) -> None:
    """What a kernel writes to parked blocks, as in vLLM's warm-up, reaches no block that has memory, then or later."""
    memory = on_gpu(BLOCK_BY_BLOCK, driver)
    blocks = memory.adopt().view(BLOCKS, CHUNK)
    blocks[1:].fill_(9)
    assert not blocks[0].any()
    memory.apply(KvMoves(sequence=1, map=[4]))
    assert not blocks[4].any()


def test_the_warm_up_leaves_nothing_behind(driver: MappedCudaDriver) -> None:
    """After it parked blocks read as zero again: a NaN there could reach a sum that multiplies it with zero."""
    memory = on_gpu(BLOCK_BY_BLOCK, driver)
    blocks = memory.adopt().view(BLOCKS, CHUNK)
    blocks[1:].fill_(9)
    memory.end_warm_up()
    assert not blocks.any()


def test_a_move_waits_for_queued_kernels(driver: MappedCudaDriver) -> None:
    """Neither a block's memory nor the scratch in its place is taken from under a kernel."""
    memory = on_gpu(BLOCK_BY_BLOCK, driver, rest_bytes=2 * CHUNK)
    driver.busy.update(driver.mappings)
    memory.apply(KvMoves(sequence=1, unmap=[1], map=[2, 3]))
    assert not driver.faults and not driver.busy


def test_books_that_contradict_the_device_are_told(driver: MappedCudaDriver) -> None:
    """A check compares what is held with what the driver counts as taken."""
    memory = on_gpu(BLOCK_BY_BLOCK, driver, rest_bytes=2 * CHUNK)
    assert memory.apply(KvMoves(sequence=1, check=2)).imbalance is None
    with patch.object(driver, "cuMemGetInfo", lambda: (Result.CUDA_SUCCESS, driver.capacity, driver.capacity)):
        assert "the device counts 0 taken" in (memory.apply(KvMoves(sequence=2, check=2)).imbalance or "")


def test_tokens_are_those_of_a_plain_cache() -> None:
    """A transformer's prefill and decode give the same tokens while memory comes and goes before every step."""
    memory = on_gpu(GEOMETRY, MappedCudaDriver(1 << 21, 1 << 27))
    extents = ExtentMap(GEOMETRY, memory.chunk_bytes)

    def move(**extents: Iterable[int]) -> None:
        assert memory.apply(KvMoves(sequence=1, **{name: list(some) for name, some in extents.items()})).error is None

    kv = memory.adopt().view(torch.float32).view(SHAPE)
    cache = ElasticCache(
        kv,
        extents,
        inflate=lambda some: move(map=set(some) - memory.mapped),
        deflate=lambda some: move(unmap=some),
        mapped=lambda: memory.mapped,
        check=memory.check_conservation,
    )
    elastic_equals_plain(cache, new=6)


@pytest.mark.parametrize("geometry", [BLOCK_BY_BLOCK, LAYER_BY_LAYER])
def test_blocks_are_copied_out_and_back(driver: MappedCudaDriver, geometry: KvGeometry) -> None:
    """A block's content, of all its layers, is what fetch shows, and what put makes it; others do not change."""
    memory = on_gpu(geometry, driver, rest_bytes=geometry.size_bytes)
    raw = memory.adopt()
    raw.copy_(torch.randint(-128, 128, (geometry.size_bytes,), dtype=torch.int8))
    layers = raw.view(geometry.regions[0].layers, BLOCKS, CHUNK)
    (part,) = memory.blocks.fetch(5)
    assert part.tobytes() == layers[:, 5].contiguous().numpy().tobytes()
    kept, before = part.copy(), layers.clone()
    memory.blocks.fetch(6)
    np.copyto(memory.blocks.room(8)[0], kept)
    memory.blocks.put(8)
    assert torch.equal(layers[:, 8], before[:, 5])
    before[:, 8] = before[:, 5]
    assert torch.equal(layers, before)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([BLOCK_BY_BLOCK, LAYER_BY_LAYER, SHARED_CHUNKS]), st.data())
def test_any_moves_and_refusals_keep_data_and_books(geometry: KvGeometry, data: st.DataObject) -> None:
    """Along any sequence of moves, of which the driver may refuse any call once, each mapped block keeps what was
    written to it, new ones read zero or what they held, and the books balance with the driver."""
    driver = MappedCudaDriver(CHUNK // CHUNK_GRANULES[0], 80 * CHUNK)
    memory = on_gpu(geometry, driver)
    extents = ExtentMap(geometry, memory.chunk_bytes)
    raw = memory.adopt()
    region = geometry.regions[0]
    written: dict[int, int] = {}

    def page(block: int) -> torch.Tensor:
        start = (region.layers - 1) * region.layer_stride_bytes + block * region.block_stride_bytes
        return raw[start : start + region.page_bytes]

    for sequence in range(1, data.draw(st.integers(2, 12))):
        free = sorted(set(range(extents.count)) - memory.mapped)
        unmap = data.draw(st.lists(st.sampled_from(sorted(memory.mapped - {0}) or [0]), unique=True, max_size=4))
        grow = data.draw(st.lists(st.sampled_from(free or [0]), unique=True, max_size=4))
        if data.draw(st.booleans()):
            name = data.draw(st.sampled_from(["cuMemCreate", "cuMemMap", "cuMemSetAccess"]))
            driver.fail_at(name, data.draw(st.integers(1, 6)), Result.CUDA_ERROR_OUT_OF_MEMORY)
        unmap = [extent for extent in unmap if extent]
        ack = memory.apply(KvMoves(sequence, unmap=unmap, map=[extent for extent in grow if extent not in unmap]))
        driver.fail_no_more()
        assert ack.imbalance is None
        memory.check_conservation()
        assert driver.held == memory.pool.bytes_by_owner()[ChunkOwner.KV_CACHE] + memory.chunk_bytes, "and scratch"
        for extent in memory.mapped:
            for block in extents.blocks_of(extent):
                if block in written:
                    assert (page(block) == written[block]).all()
                written[block] = sequence
                page(block).fill_(sequence)
        written = {block: value for block, value in written.items() if extents.extent_of(block) in memory.mapped}
        if len(driver.mappings) * CHUNK >= geometry.size_bytes:  # else the driver has refused the scratch of a slot
            raw.sum()
    assert not driver.faults
    memory.device.vmm.close()
    assert driver.held == 0
