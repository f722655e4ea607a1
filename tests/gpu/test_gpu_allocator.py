"""Activations through torch's MemPool: real kernels in chunks of the pool that the KV cache uses."""

from collections.abc import Iterator

import pytest
import torch
from gpu_memory import DEVICE, Child, free_while_allocating

from memory_agent.chunks import ChunkOwner, ChunkPool
from memory_agent.cuda_allocator import CudaAllocator
from memory_agent.cuda_vmm import CudaVmm
from memory_agent.errors import PoolExhausted

MIB = 1 << 20


@pytest.fixture
def pool(vmm: CudaVmm) -> ChunkPool:
    return ChunkPool(vmm, vmm.granularity_bytes, limit_chunks=256)


@pytest.fixture
def allocator(vmm: CudaVmm, pool: ChunkPool) -> Iterator[CudaAllocator]:
    allocator = CudaAllocator(vmm, pool)
    yield allocator
    allocator.close()


def charged(pool: ChunkPool) -> int:
    return pool.bytes_by_owner()[ChunkOwner.ACTIVATION]


def mlp(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x @ up) @ down


def test_a_forward_in_the_pool_computes_the_same(allocator: CudaAllocator, pool: ChunkPool) -> None:
    """A forward whose activations are chunks of the pool gives the same numbers, and is charged for them."""
    x, up, down = (torch.randn(2048, 2048, device=DEVICE) for _ in range(3))
    expected = mlp(x, up, down)
    before = torch.cuda.memory_allocated()
    with allocator.activation_pool():
        got = mlp(x, up, down)
    assert torch.equal(got, expected)
    assert torch.cuda.memory_allocated() > before
    assert charged(pool) >= 2 * x.nbytes
    allocator.segments.check_conservation()


def test_the_next_forward_uses_the_same_memory(allocator: CudaAllocator, pool: ChunkPool) -> None:
    """Repeated forwards take no more chunks than the first: torch keeps the segments until a trim."""
    x, up, down = (torch.randn(1024, 1024, device=DEVICE) for _ in range(3))
    with allocator.activation_pool():
        mlp(x, up, down)
    first = charged(pool)
    for _ in range(20):
        with allocator.activation_pool():
            mlp(x, up, down)
    assert charged(pool) == first > 0


def test_trim_gives_the_memory_to_the_kv_cache_and_to_the_device(
    allocator: CudaAllocator, pool: ChunkPool, vmm: CudaVmm
) -> None:
    """After a trim no chunk is charged to activations, the KV cache can take all, and the device gets them back."""
    free_before, _ = vmm.device_bytes()
    with allocator.activation_pool():
        torch.empty(300 * MIB, dtype=torch.uint8, device=DEVICE)
    assert charged(pool) >= 300 * MIB
    assert allocator.trim() >= 300 * MIB
    assert charged(pool) == 0 and pool.available_chunks == 256
    kv = pool.take(ChunkOwner.KV_CACHE, 256)
    allocator.segments.check_conservation()
    pool.give(ChunkOwner.KV_CACHE, kv)
    pool.trim()
    assert free_before - vmm.device_bytes()[0] < 16 * MIB


def test_a_tensor_that_lives_keeps_its_memory_over_a_trim(allocator: CudaAllocator, pool: ChunkPool) -> None:
    """An output that outlives the forward is intact and charged after a trim; a trim after its end frees it."""
    with allocator.activation_pool():
        kept = torch.full((30 * MIB,), 4, dtype=torch.uint8, device=DEVICE)
        torch.empty(50 * MIB, dtype=torch.uint8, device=DEVICE)
    allocator.trim()
    assert 30 * MIB <= charged(pool) < 50 * MIB
    with allocator.activation_pool():
        torch.full((60 * MIB,), 5, dtype=torch.uint8, device=DEVICE)
    assert int(kept.sum(dtype=torch.int64)) == 4 * 30 * MIB
    del kept
    allocator.trim()
    assert charged(pool) == 0


def test_an_exhausted_pool_is_out_of_memory_with_its_cause(allocator: CudaAllocator, pool: ChunkPool) -> None:
    """torch raises its OutOfMemoryError, caused by PoolExhausted; nothing is charged, and a larger limit helps."""
    pool.limit_chunks = 8
    with pytest.raises(torch.OutOfMemoryError) as caught, allocator.activation_pool():
        torch.empty(200 * MIB, dtype=torch.uint8, device=DEVICE)
    assert isinstance(caught.value.__cause__, PoolExhausted)
    assert charged(pool) == 0
    del caught
    pool.limit_chunks = 256
    with allocator.activation_pool():
        torch.empty(200 * MIB, dtype=torch.uint8, device=DEVICE)
    allocator.segments.check_conservation()


def test_memory_outside_the_block_is_not_charged(allocator: CudaAllocator, pool: ChunkPool) -> None:
    """What is allocated before and after the block comes from torch's own pool."""
    with allocator.activation_pool():
        pass
    torch.empty(100 * MIB, dtype=torch.uint8, device=DEVICE)
    assert charged(pool) == 0


def test_trim_waits_for_kernels_of_every_stream(allocator: CudaAllocator, pool: ChunkPool) -> None:
    """A tensor dropped while a slow kernel still writes it: trim gives its memory away only after that."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), allocator.activation_pool():
        tensor = torch.empty(40 * MIB, dtype=torch.uint8, device=DEVICE)
        torch.cuda._sleep(200_000_000)
        tensor.fill_(1)
    del tensor
    allocator.trim()
    assert stream.query() and charged(pool) == 0
    torch.cuda.synchronize()


def test_no_deadlock_with_a_thread_that_frees() -> None:
    """Segments are asked for and trimmed in one thread while another frees tensors, and neither hangs."""
    with Child(free_while_allocating, 10.0) as child:
        rounds, left = child.answer(timeout_s=120)
    assert rounds > 0 and left == 0
