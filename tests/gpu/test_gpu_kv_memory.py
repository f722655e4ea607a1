"""A worker's KV memory and its steps on the real device: what tests/unit/replicas/test_cuda_kv.py plays."""

from collections.abc import Iterable, Iterator

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="KV memory of an engine needs vLLM")

from memory_agent.chunks import ChunkOwner
from memory_agent.cuda_vmm import CudaVmm
from memory_agent.extents import ExtentMap, KvGeometry, KvRegion
from replicas.cuda_meter import CudaMeter
from replicas.kv_device import CudaDevice
from replicas.kv_memory import KvMemory
from replicas.kv_moves import KvMoves
from tests.tiny_transformer import GEOMETRY, SHAPE, ElasticCache, elastic_equals_plain

MIB = 1 << 20
BLOCKS = 64
BLOCK = 16 * MIB
BLOCK_BY_BLOCK = KvGeometry(BLOCKS * BLOCK, BLOCKS, (KvRegion(0, 1, BLOCK, BLOCK, BLOCK),))


def make(geometry: KvGeometry, rest_bytes: int = 0) -> KvMemory:
    torch.cuda.init()
    return KvMemory(geometry, rest_bytes, CudaDevice(torch.cuda.current_device()))


@pytest.fixture
def memory() -> Iterator[KvMemory]:
    """Of 64 blocks, a chunk each, of which four are mapped."""
    memory = make(BLOCK_BY_BLOCK, rest_bytes=4 * BLOCK)
    yield memory
    torch.cuda.synchronize()
    memory.device.vmm.close()


def test_tokens_are_those_of_a_plain_cache() -> None:
    """A transformer's prefill and decode give the same tokens while memory comes and goes before every step, and the
    device has all of it back."""
    torch.cuda.init()
    watcher = CudaVmm()
    before, _ = watcher.device_bytes()
    memory = make(GEOMETRY)
    extents = ExtentMap(GEOMETRY, memory.chunk_bytes)

    def move(**extents: Iterable[int]) -> None:
        ack = memory.apply(KvMoves(sequence=1, **{name: list(some) for name, some in extents.items()}))
        assert ack.error is None

    with memory.allocation():
        kv = torch.zeros(GEOMETRY.size_bytes, dtype=torch.int8, device="cuda")
    memory.require_adopted()
    cache = ElasticCache(
        kv.view(torch.float32).view(SHAPE),
        extents,
        inflate=lambda some: move(map=set(some) - memory.mapped),
        deflate=lambda some: move(unmap=some),
        mapped=lambda: memory.mapped,
        check=memory.check_conservation,
    )
    elastic_equals_plain(cache, new=120)
    torch.cuda.synchronize()
    memory.device.vmm.close()
    torch.cuda.empty_cache()
    assert before - watcher.device_bytes()[0] < 16 * MIB
    watcher.close()


def test_kernels_may_touch_blocks_without_memory(memory: KvMemory) -> None:
    """As vLLM's warm-up does: the process lives, no block with memory is changed, and afterwards they read as zero."""
    blocks = memory.adopt().view(BLOCKS, -1)
    blocks[:4].fill_(3)
    blocks[4:].fill_(9)
    assert (blocks[:4] == 3).all()
    memory.end_warm_up()
    assert not blocks[4:].any()
    memory.apply(KvMoves(sequence=1, map=[10]))
    assert not blocks[10].any()
    memory.check_conservation()


def test_a_move_while_kernels_run(memory: KvMemory) -> None:
    """Kernels that are queued before a move still find the memory that they were queued for."""
    blocks = memory.adopt().view(BLOCKS, -1)
    torch.cuda._sleep(200_000_000)  # cycles: about 0.1 s
    blocks[2].fill_(5)
    blocks[30].fill_(6)  # parked
    total = blocks[2].sum(dtype=torch.int64)
    memory.apply(KvMoves(sequence=1, unmap=[2], map=[30]))
    assert int(total) == 5 * BLOCK and not blocks[30].any()


def test_blocks_are_copied_when_what_was_queued_is_done(memory: KvMemory) -> None:
    """fetch shows what kernels that still run will have written; put is seen by all that is queued after it."""
    blocks = memory.adopt().view(BLOCKS, -1)
    torch.cuda._sleep(200_000_000)
    blocks[1].fill_(7)
    (part,) = memory.blocks.fetch(1)
    assert (np.asarray(part) == 7).all()
    np.copyto(memory.blocks.room(3)[0], np.uint8(8))
    memory.blocks.put(3)
    assert (blocks[3] == 8).all() and (blocks[1] == 7).all()


def test_activations_and_kv_memory_share_a_pool(memory: KvMemory) -> None:
    """What steps take is measured in the pool's chunks; a rest gives it to the device, and KV memory can have it."""
    meter = CudaMeter(memory.device.allocator(memory.pool), memory.pool)
    kv_bytes = memory.pool.bytes_by_owner()[ChunkOwner.KV_CACHE]
    x = torch.randn(2048, 2048, device="cuda")
    expected = torch.nn.functional.gelu(x @ x) @ x
    samples = []
    for _ in range(3):
        samples += meter.finish_step()
        meter.make_room(10, 1, 256 * MIB)
        with meter.step():
            meter.start_step(10, 1)
            got = torch.nn.functional.gelu(x @ x) @ x
        assert torch.equal(got, expected)
        del got
    samples += meter.finish_step()
    assert samples[0].peak_bytes is not None and samples[0].peak_bytes >= 2 * x.nbytes
    assert samples[-1].kept_bytes == memory.pool.bytes_by_owner()[ChunkOwner.ACTIVATION]
    meter.rest()
    assert memory.pool.bytes_by_owner()[ChunkOwner.ACTIVATION] == 0
    assert memory.pool.held_bytes == kv_bytes
    assert memory.apply(KvMoves(sequence=1, map=list(range(4, BLOCKS)))).error is None
    memory.check_conservation()
