"""The contract of a Vmm backend, held by every backend alike."""

from collections.abc import Callable, Iterator

import pytest
from fake_cuda_driver import FakeCudaDriver

from memory_agent.cuda_vmm import CudaVmm
from memory_agent.errors import OutOfDeviceMemory
from memory_agent.fake_vmm import FakeVmm
from memory_agent.host_vmm import HostVmm
from memory_agent.vmm import ContractViolation, Vmm

PAGE = 4096


BACKENDS: dict[str, Callable[[], Vmm]] = {
    "fake": lambda: FakeVmm(PAGE, 16 * PAGE),
    "host": lambda: HostVmm("ellm-test", 16 * PAGE),
    "cuda": lambda: CudaVmm(driver=FakeCudaDriver(PAGE, 16 * PAGE)),
}


@pytest.fixture(params=BACKENDS)
def vmm(request: pytest.FixtureRequest) -> Iterator[Vmm]:
    backend = BACKENDS[request.param]()
    yield backend
    backend.close()


def test_held_bytes_follow_create_and_release_and_nothing_else(vmm: Vmm) -> None:
    """Physical memory is committed by create and given back by release; reserving and mapping take none."""
    address = vmm.reserve(8 * PAGE)
    assert vmm.held_bytes() == 0
    handle = vmm.create(2 * PAGE)
    assert vmm.held_bytes() == 2 * PAGE
    vmm.map(address, handle)
    vmm.unmap(address, 2 * PAGE)
    assert vmm.held_bytes() == 2 * PAGE
    vmm.release(handle)
    assert vmm.held_bytes() == 0
    vmm.free(address, 8 * PAGE)


def test_create_beyond_the_capacity_is_refused_and_changes_nothing(vmm: Vmm) -> None:
    """When the capacity is used up, create raises OutOfDeviceMemory, and works again after a release."""
    handles = [vmm.create(PAGE) for _ in range(16)]
    with pytest.raises(OutOfDeviceMemory):
        vmm.create(PAGE)
    assert vmm.held_bytes() == 16 * PAGE
    vmm.release(handles[7])
    assert vmm.create(PAGE).size_bytes == PAGE


def test_a_chunk_is_released_once_and_never_while_mapped(vmm: Vmm) -> None:
    """Releasing a mapped chunk, or one twice, is a contract violation."""
    address, handle = vmm.reserve(PAGE), vmm.create(PAGE)
    vmm.map(address, handle)
    with pytest.raises(ContractViolation, match="still mapped"):
        vmm.release(handle)
    vmm.unmap(address, PAGE)
    vmm.release(handle)
    with pytest.raises(ContractViolation, match="not alive"):
        vmm.release(handle)


def test_a_dead_chunk_cannot_be_mapped(vmm: Vmm) -> None:
    """Mapping a released chunk is a contract violation."""
    address, handle = vmm.reserve(PAGE), vmm.create(PAGE)
    vmm.release(handle)
    with pytest.raises(ContractViolation, match="not alive"):
        vmm.map(address, handle)


def test_a_chunk_has_one_mapping(vmm: Vmm) -> None:
    """Mapping one chunk at two addresses is a contract violation."""
    address, handle = vmm.reserve(2 * PAGE), vmm.create(PAGE)
    vmm.map(address, handle)
    with pytest.raises(ContractViolation, match="still mapped"):
        vmm.map(address + PAGE, handle)


@pytest.mark.parametrize("page_offset", [1, 2, 3])
def test_mappings_never_overlap(vmm: Vmm, page_offset: int) -> None:
    """Mapping over any part of another mapping is a contract violation, from either side."""
    address, two = vmm.reserve(8 * PAGE), vmm.create(2 * PAGE)
    vmm.map(address + 2 * PAGE, two)
    with pytest.raises(ContractViolation, match=r"already mapped|reaches over"):
        vmm.map(address + page_offset * PAGE, vmm.create(2 * PAGE))


@pytest.mark.parametrize("page_offset", [-1, 3, 4, 100])
def test_mappings_stay_inside_reserved_ranges(vmm: Vmm, page_offset: int) -> None:
    """Mapping outside a reserved range, or over its end, is a contract violation."""
    address, two = vmm.reserve(4 * PAGE), vmm.create(2 * PAGE)
    with pytest.raises(ContractViolation, match="no reserved range"):
        vmm.map(address + page_offset * PAGE, two)


def test_sizes_and_addresses_are_multiples_of_the_granularity(vmm: Vmm) -> None:
    """Anything that is no multiple of the granularity is a contract violation."""
    address, handle = vmm.reserve(4 * PAGE), vmm.create(PAGE)
    for size in (0, -PAGE, PAGE + 1):
        with pytest.raises(ContractViolation):
            vmm.create(size)
        with pytest.raises(ContractViolation):
            vmm.reserve(size)
    with pytest.raises(ContractViolation):
        vmm.map(address + 512, handle)


def test_unmap_undoes_exactly_one_map(vmm: Vmm) -> None:
    """Unmapping what is not mapped, or a part of a mapping, is a contract violation."""
    address, handle = vmm.reserve(4 * PAGE), vmm.create(2 * PAGE)
    vmm.map(address, handle)
    for start, size in ((address + PAGE, PAGE), (address, PAGE), (address, 4 * PAGE), (address + 2 * PAGE, PAGE)):
        with pytest.raises(ContractViolation, match="no chunk"):
            vmm.unmap(start, size)
    vmm.unmap(address, 2 * PAGE)
    with pytest.raises(ContractViolation, match="no chunk"):
        vmm.unmap(address, 2 * PAGE)


def test_a_range_is_freed_whole_and_empty(vmm: Vmm) -> None:
    """Freeing a foreign range, a part of one, or one with a mapping in it is a contract violation."""
    address, handle = vmm.reserve(4 * PAGE), vmm.create(PAGE)
    vmm.map(address + 3 * PAGE, handle)
    for start, size in ((address, 2 * PAGE), (address + PAGE, 3 * PAGE), (0, 4 * PAGE)):
        with pytest.raises(ContractViolation, match="was reserved"):
            vmm.free(start, size)
    with pytest.raises(ContractViolation, match="still mapped"):
        vmm.free(address, 4 * PAGE)
    vmm.unmap(address + 3 * PAGE, PAGE)
    vmm.free(address, 4 * PAGE)
    with pytest.raises(ContractViolation, match="was reserved"):
        vmm.free(address, 4 * PAGE)


def test_close_may_be_called_twice_with_chunks_mapped(vmm: Vmm) -> None:
    """Close gives back what is still mapped, and closing again is allowed."""
    vmm.map(vmm.reserve(PAGE), vmm.create(PAGE))
    vmm.close()
    vmm.close()


@pytest.mark.parametrize("call", ["reserve", "free", "create", "release", "map", "unmap"])
def test_the_fake_fails_at_the_call_it_was_told_to(call: str) -> None:
    """fail_at makes exactly the nth call raise, before it changed anything; the same call then succeeds."""
    vmm = FakeVmm(PAGE, 16 * PAGE)

    def cycle() -> None:
        address, handle = vmm.reserve(PAGE), vmm.create(PAGE)
        vmm.map(address, handle)
        vmm.unmap(address, PAGE)
        vmm.release(handle)
        vmm.free(address, PAGE)

    vmm.fail_at(call, 2)
    cycle()
    with pytest.raises(OutOfDeviceMemory, match=f"{call} number 2"):
        cycle()
    cycle()
