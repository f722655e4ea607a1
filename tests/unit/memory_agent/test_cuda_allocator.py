"""Segments of activations over a pool. That torch asks for them and drops them needs a GPU: tests/gpu."""

import pytest
from fake_cuda_driver import FakeCudaDriver, Result

from memory_agent.chunks import ChunkOwner, ChunkPool
from memory_agent.cuda_allocator import Segments
from memory_agent.cuda_vmm import CudaVmm
from memory_agent.errors import OutOfDeviceMemory, PoolExhausted
from memory_agent.fake_vmm import FakeVmm
from memory_agent.vmm import ContractViolation

CHUNK = 4096


@pytest.fixture
def vmm() -> FakeVmm:
    return FakeVmm(CHUNK, 16 * CHUNK)


@pytest.fixture
def pool(vmm: FakeVmm) -> ChunkPool:
    return ChunkPool(vmm, CHUNK, limit_chunks=8)


@pytest.fixture
def segments(vmm: FakeVmm, pool: ChunkPool) -> Segments:
    return Segments(vmm, pool)


def test_a_segment_is_charged_in_whole_chunks(segments: Segments, pool: ChunkPool) -> None:
    """A segment takes the chunks that cover it, and a request of one byte takes one."""
    segments.allocate(2 * CHUNK + 1)
    segments.allocate(1)
    assert pool.bytes_by_owner()[ChunkOwner.ACTIVATION] == 4 * CHUNK == segments.committed_bytes
    segments.check_conservation()


def test_a_segment_is_contiguous_and_usable_in_whole() -> None:
    """Every chunk of a segment is mapped and accessible, one behind the other."""
    driver = FakeCudaDriver(CHUNK, 8 * CHUNK)
    vmm = CudaVmm(driver=driver)
    address = Segments(vmm, ChunkPool(vmm, CHUNK, 8)).allocate(3 * CHUNK)
    for slot in range(3):
        driver.memory(address + slot * CHUNK)[:] = bytes([slot]) * CHUNK


def test_keep_gives_back_all_but_the_named_segments(segments: Segments, pool: ChunkPool) -> None:
    """Chunks of segments that torch has dropped are FREE afterwards, so the KV cache can take them at once."""
    one, two, three = (segments.allocate(size * CHUNK) for size in (1, 2, 3))
    assert segments.keep({two, 0xABC}) == 4 * CHUNK
    assert list(segments.addresses) == [two] and one != three
    assert pool.available_chunks == 6 and pool.held_bytes == 6 * CHUNK
    pool.take(ChunkOwner.KV_CACHE, 6)
    segments.check_conservation()


def test_an_exhausted_pool_charges_nothing(segments: Segments, pool: ChunkPool, vmm: FakeVmm) -> None:
    """Beyond the limit, PoolExhausted; what the pool has is left for smaller requests, and no address leaks."""
    pool.take(ChunkOwner.KV_CACHE, 6)
    with pytest.raises(PoolExhausted, match="3 chunks wanted, 2 available"):
        segments.allocate(3 * CHUNK)
    segments.check_conservation()
    assert not vmm._ledger.ranges
    segments.allocate(2 * CHUNK)


@pytest.mark.parametrize(("call", "nth"), [("reserve", 1), ("create", 3), ("map", 1), ("map", 3)])
def test_a_failure_in_the_middle_charges_nothing(
    segments: Segments, pool: ChunkPool, vmm: FakeVmm, call: str, nth: int
) -> None:
    """Whichever step the system refuses, no chunk is charged, no address is kept, and the next try succeeds."""
    vmm.fail_at(call, nth)
    with pytest.raises(OutOfDeviceMemory, match=call):
        segments.allocate(3 * CHUNK)
    assert pool.bytes_by_owner()[ChunkOwner.ACTIVATION] == 0 == segments.committed_bytes
    assert not vmm._ledger.ranges
    segments.check_conservation()
    segments.allocate(3 * CHUNK)


@pytest.mark.parametrize(("call", "left"), [("unmap", 3), ("free", 0)])
def test_what_cannot_be_given_back_stays_charged_until_it_can(
    segments: Segments, pool: ChunkPool, vmm: FakeVmm, call: str, left: int
) -> None:
    """A refused unmap or free leaves a remnant that is still counted; the next keep takes it apart."""
    segments.allocate(3 * CHUNK)
    vmm.fail_at(call, 1)
    assert segments.keep(()) == (3 - left) * CHUNK
    assert segments.committed_bytes == left * CHUNK and not segments.addresses
    segments.check_conservation()
    assert segments.keep(()) == left * CHUNK
    assert not vmm._ledger.ranges
    segments.check_conservation()


def test_the_undo_of_a_failed_allocation_may_fail_too(segments: Segments, pool: ChunkPool, vmm: FakeVmm) -> None:
    """The first error is the one raised; what stayed mapped is charged and goes with the next keep."""
    vmm.fail_at("map", 2)
    vmm.fail_at("unmap", 1)
    with pytest.raises(OutOfDeviceMemory, match="map number 2"):
        segments.allocate(3 * CHUNK)
    assert pool.bytes_by_owner()[ChunkOwner.ACTIVATION] == CHUNK
    segments.check_conservation()
    segments.keep(())
    assert pool.bytes_by_owner()[ChunkOwner.ACTIVATION] == 0


def test_conservation_notices_a_foreign_charge(segments: Segments, pool: ChunkPool) -> None:
    """A chunk charged to activations that no segment maps is a violation."""
    segments.allocate(CHUNK)
    pool.take(ChunkOwner.ACTIVATION, 1)
    with pytest.raises(ContractViolation, match="8192 bytes are charged to activations, 4096 are mapped"):
        segments.check_conservation()


def test_queued_kernels_are_done_before_their_segment_is_unmapped() -> None:
    """torch may drop a segment while a kernel that uses it is queued: giving it up waits."""
    driver = FakeCudaDriver(CHUNK, 8 * CHUNK)
    vmm = CudaVmm(driver=driver)
    segments = Segments(vmm, ChunkPool(vmm, CHUNK, 8))
    driver.busy.add(segments.allocate(CHUNK))
    segments.keep(())
    assert not driver.faults and not driver.mappings
    driver.fail_at("cuMemCreate", 2, Result.CUDA_ERROR_OUT_OF_MEMORY)
    with pytest.raises(OutOfDeviceMemory):
        segments.allocate(3 * CHUNK)
    segments.check_conservation()
