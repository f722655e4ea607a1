"""CudaVmm against a driver that keeps CUDA's own rules and fails on purpose. The common contract is in test_vmm.py."""

import logging
import sys

import pytest
from fake_cuda_driver import GARBAGE, FakeCudaDriver, Result
from hypothesis import given
from hypothesis import strategies as st

from memory_agent.chunks import ChunkOwner, ChunkPool
from memory_agent.cuda_driver import CudaError
from memory_agent.cuda_vmm import CudaVmm
from memory_agent.errors import OutOfDeviceMemory, SettingsError
from memory_agent.vmm import ContractViolation

CHUNK = 4096
OOM = Result.CUDA_ERROR_OUT_OF_MEMORY
ILLEGAL = Result.CUDA_ERROR_ILLEGAL_ADDRESS


@pytest.fixture
def driver() -> FakeCudaDriver:
    return FakeCudaDriver(CHUNK, 16 * CHUNK)


@pytest.fixture
def vmm(driver: FakeCudaDriver) -> CudaVmm:
    return CudaVmm(driver=driver)


def test_a_chunk_is_cleared_before_anybody_sees_it(driver: FakeCudaDriver, vmm: CudaVmm) -> None:
    """What another process left in the memory is gone when create returns, for small chunks and larger ones."""
    for chunks in (1, 3, 2):
        address, handle = vmm.reserve(chunks * CHUNK), vmm.create(chunks * CHUNK)
        vmm.map(address, handle)
        assert driver.memory(address) == bytes(chunks * CHUNK)
    assert not driver.faults


def test_the_fake_hands_out_garbage(driver: FakeCudaDriver, vmm: CudaVmm) -> None:
    """A chunk that is not cleared reads as garbage: the test above can fail."""
    _, number = driver.cuMemCreate(CHUNK, vmm._properties, 0)
    assert driver.handles[number].data == bytes([GARBAGE]) * CHUNK


def test_data_survives_a_change_of_address(driver: FakeCudaDriver, vmm: CudaVmm) -> None:
    """Unmapping and mapping elsewhere keeps what the chunk held."""
    address, handle = vmm.reserve(2 * CHUNK), vmm.create(CHUNK)
    vmm.map(address, handle)
    driver.memory(address)[:4] = b"data"
    vmm.unmap(address, CHUNK)
    vmm.map(address + CHUNK, handle)
    assert driver.memory(address + CHUNK)[:4] == b"data"


def test_unmap_waits_for_queued_kernels(driver: FakeCudaDriver, vmm: CudaVmm) -> None:
    """Addresses are taken away only when what was queued on the device is done."""
    address, handle = vmm.reserve(CHUNK), vmm.create(CHUNK)
    vmm.map(address, handle)
    driver.busy.add(address)
    vmm.unmap(address, CHUNK)
    assert not driver.faults and not driver.busy


def test_creating_and_mapping_wait_for_no_kernel(driver: FakeCudaDriver, vmm: CudaVmm) -> None:
    """A chunk is cleared and mapped while kernels run: only the stream that clears is waited for."""
    address = vmm.reserve(CHUNK)
    driver.busy.add(0xDEAD000)
    vmm.map(address, vmm.create(CHUNK))
    assert driver.busy and driver.calls["cuCtxSynchronize"] == 0


def test_a_chunk_of_a_dead_tenant_is_released_while_another_is_mapped(driver: FakeCudaDriver, vmm: CudaVmm) -> None:
    """held_bytes is what the driver holds, at each step."""
    address, one, two = vmm.reserve(CHUNK), vmm.create(CHUNK), vmm.create(2 * CHUNK)
    vmm.map(address, one)
    assert vmm.held_bytes() == driver.held == 3 * CHUNK
    vmm.release(two)
    assert vmm.held_bytes() == driver.held == CHUNK
    vmm.unmap(address, CHUNK)
    vmm.release(one)
    assert vmm.held_bytes() == driver.held == 0


@pytest.mark.parametrize("name", ["cuMemMap", "cuMemSetAccess", "cuMemCreate", "cuMemAddressReserve"])
def test_no_memory_is_the_recoverable_error_and_changes_nothing(
    driver: FakeCudaDriver, vmm: CudaVmm, name: str
) -> None:
    """Where the driver has no memory for a step, OutOfDeviceMemory names the call, and the same then works."""
    address, other = vmm.reserve(CHUNK), vmm.create(CHUNK)
    before = driver.held, dict(driver.reserved), dict(driver.mappings), set(driver.handles)
    driver.fail_at(name, 1, OOM)
    with pytest.raises(OutOfDeviceMemory, match=rf"{name}: CUDA_ERROR_OUT_OF_MEMORY, what CUDA"):
        if name == "cuMemAddressReserve":
            vmm.reserve(CHUNK)
        elif name == "cuMemCreate":
            vmm.create(CHUNK)
        else:
            vmm.map(address, other)
    assert (driver.held, driver.reserved, driver.mappings, set(driver.handles)) == before
    vmm.map(address, other)
    vmm.create(CHUNK)
    vmm.reserve(CHUNK)


@pytest.mark.parametrize(
    "name",
    ["cuMemCreate", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess", "cuMemsetD8Async", "cuStreamSynchronize"],
)
def test_a_create_that_fails_in_the_middle_holds_nothing(driver: FakeCudaDriver, name: str) -> None:
    """Whichever step of clearing fails, the new memory is with the driver again and no mapping is left."""
    vmm = CudaVmm(driver=driver)
    driver.fail_at(name, 1, OOM)
    with pytest.raises(OutOfDeviceMemory, match=name):
        vmm.create(CHUNK)
    assert driver.held == vmm.held_bytes() == 0
    assert not driver.mappings and not driver.handles


def test_a_window_that_cannot_be_emptied_counts_and_is_emptied_later(driver: FakeCudaDriver, vmm: CudaVmm) -> None:
    """When even the undo of a create is refused, held_bytes shows the bytes, and the next create gets them back."""
    driver.fail_at("cuMemUnmap", 1, ILLEGAL)
    with pytest.raises(CudaError):
        vmm.create(CHUNK)
    assert vmm.held_bytes() == driver.held == CHUNK
    vmm.create(2 * CHUNK)
    assert vmm.held_bytes() == driver.held == 2 * CHUNK
    driver.fail_at("cuMemUnmap", 1, ILLEGAL)
    with pytest.raises(CudaError):
        vmm.create(CHUNK)
    vmm.close()
    assert driver.held == 0


@pytest.mark.parametrize("name", ["cuCtxSynchronize", "cuMemUnmap"])
def test_an_unmap_that_fails_leaves_the_mapping(driver: FakeCudaDriver, vmm: CudaVmm, name: str) -> None:
    """When the device is broken, or the driver refuses, unmap raises CudaError and the chunk is still mapped."""
    address, handle = vmm.reserve(CHUNK), vmm.create(CHUNK)
    vmm.map(address, handle)
    driver.fail_at(name, 1, ILLEGAL)
    with pytest.raises(CudaError, match=f"{name}: CUDA_ERROR_ILLEGAL_ADDRESS, what CUDA_ERROR_ILLEGAL_ADDRESS means"):
        vmm.unmap(address, CHUNK)
    assert address in driver.mappings
    with pytest.raises(ContractViolation, match="still mapped"):
        vmm.release(handle)
    vmm.unmap(address, CHUNK)
    vmm.release(handle)


def test_a_release_that_fails_keeps_the_chunk(driver: FakeCudaDriver, vmm: CudaVmm) -> None:
    """When the driver refuses, the chunk is alive, is counted, and can be released again."""
    handle = vmm.create(CHUNK)
    driver.fail_at("cuMemRelease", 1, ILLEGAL)
    with pytest.raises(CudaError, match="cuMemRelease"):
        vmm.release(handle)
    assert vmm.held_bytes() == driver.held == CHUNK
    vmm.release(handle)
    assert driver.held == 0


def test_the_context_of_the_calling_thread_is_left_as_it_was(driver: FakeCudaDriver, vmm: CudaVmm) -> None:
    """The primary context is current only during a call, also where the call fails."""
    vmm.map(vmm.reserve(CHUNK), handle := vmm.create(CHUNK))
    driver.fail_at("cuMemsetD8Async", 1, ILLEGAL)
    with pytest.raises(CudaError):
        vmm.create(CHUNK)
    with pytest.raises(ContractViolation):
        vmm.release(handle)
    assert vmm.device_bytes() == (15 * CHUNK, 16 * CHUNK)
    assert driver.contexts == []


def test_an_exported_chunk_is_the_same_memory_elsewhere(driver: FakeCudaDriver, vmm: CudaVmm) -> None:
    """A descriptor imported by another backend maps the same bytes, uncleared; they count where they were created."""
    other = CudaVmm(driver=driver)
    address, handle = vmm.reserve(CHUNK), vmm.create(CHUNK)
    vmm.map(address, handle)
    driver.memory(address)[:6] = b"shared"
    fd = vmm.export_fd(handle)
    there, imported = other.reserve(CHUNK), other.import_fd(fd, CHUNK)
    other.map(there, imported)
    assert driver.memory(there) is driver.memory(address)
    assert (vmm.held_bytes(), other.held_bytes()) == (CHUNK, 0)
    vmm.unmap(address, CHUNK)
    vmm.release(handle)
    driver.close_descriptor(fd)
    assert driver.held == CHUNK, "the importer still holds it"
    other.unmap(there, CHUNK)
    other.release(imported)
    assert driver.held == 0
    with pytest.raises(ContractViolation, match="not alive"):
        vmm.export_fd(handle)


def backed(vmm: CudaVmm, slots: int) -> int:
    address = vmm.reserve(slots * CHUNK)
    vmm.back(address, slots * CHUNK, CHUNK)
    return address


def test_a_backed_range_shows_scratch_where_there_is_no_chunk(driver: FakeCudaDriver, vmm: CudaVmm) -> None:
    """Slots without a chunk are one memory that nobody owns; a chunk takes its slot's place and leaves it again."""
    address = backed(vmm, 3)
    scratch = driver.memory(address)
    assert scratch == bytes(CHUNK) and driver.memory(address + CHUNK) is scratch is driver.memory(address + 2 * CHUNK)
    assert (vmm.held_bytes(), driver.held) == (0, CHUNK)
    vmm.map(address + CHUNK, vmm.create(CHUNK))
    driver.memory(address + CHUNK)[:4] = b"data"
    assert scratch == bytes(CHUNK) and driver.memory(address + 2 * CHUNK) is scratch
    vmm.unmap(address + CHUNK, CHUNK)
    assert driver.memory(address + CHUNK) is scratch


def test_a_backed_slot_changes_only_when_the_device_is_idle(driver: FakeCudaDriver, vmm: CudaVmm) -> None:
    """A kernel that is queued may touch the scratch: neither it nor a chunk is taken from under it."""
    address = backed(vmm, 2)
    for change in (lambda: vmm.map(address, vmm.create(CHUNK)), lambda: vmm.unmap(address, CHUNK)):
        driver.busy.add(address)
        change()
        assert not driver.busy
    assert not driver.faults


def test_scratch_can_be_cleared(driver: FakeCudaDriver, vmm: CudaVmm) -> None:
    """What kernels wrote where no chunk is reads as zero afterwards, and chunks keep their data."""
    address = backed(vmm, 2)
    vmm.map(address, vmm.create(CHUNK))
    driver.memory(address)[:4], driver.memory(address + CHUNK)[:4] = b"data", b"junk"
    vmm.clear_scratch()
    assert driver.memory(address + CHUNK) == bytes(CHUNK) and driver.memory(address)[:4] == b"data"


@pytest.mark.parametrize("name", ["cuMemMap", "cuMemSetAccess"])
def test_a_refused_map_into_a_backed_range_shows_scratch_again(driver: FakeCudaDriver, vmm: CudaVmm, name: str) -> None:
    """As in any range nothing has changed, and the same then works."""
    address, handle = backed(vmm, 2), vmm.create(CHUNK)
    scratch = driver.memory(address)
    driver.fail_at(name, 1, OOM)
    with pytest.raises(OutOfDeviceMemory, match=name):
        vmm.map(address, handle)
    assert driver.memory(address) is scratch
    vmm.map(address, handle)
    assert driver.memory(address) is not scratch


def test_an_unmap_is_done_where_the_scratch_is_refused(
    driver: FakeCudaDriver, vmm: CudaVmm, caplog: pytest.LogCaptureFixture
) -> None:
    """The slot then has no memory, which is logged, until a chunk is mapped there or another one is unmapped."""
    address, one, two = backed(vmm, 2), vmm.create(CHUNK), vmm.create(CHUNK)
    for _ in range(2):
        vmm.map(address, one)
        driver.fail_at("cuMemMap", 1, OOM)
        with caplog.at_level(logging.WARNING):
            vmm.unmap(address, CHUNK)
        assert address not in driver.mappings and "nothing is behind" in caplog.text
    vmm.map(address + CHUNK, two)
    vmm.unmap(address + CHUNK, CHUNK)
    assert driver.memory(address) is driver.memory(address + CHUNK)


@pytest.mark.parametrize("end", ["free", "close"])
def test_the_end_of_a_backed_range_leaves_nothing(driver: FakeCudaDriver, vmm: CudaVmm, end: str) -> None:
    """Freed, or closed with a chunk mapped, the driver has the scratch and the addresses back."""
    address = backed(vmm, 3)
    if end == "free":
        vmm.free(address, 3 * CHUNK)
    else:
        vmm.map(address, vmm.create(CHUNK))
        vmm.close()
    assert driver.held == 0 and not driver.mappings and address not in driver.reserved
    vmm.close()
    assert not driver.handles and driver.retained == 0


def test_only_a_whole_range_is_backed_and_only_one(vmm: CudaVmm) -> None:
    """Another size, slots that do not fill it, or a second range are contract violations."""
    address = vmm.reserve(3 * CHUNK)
    for size, slot in ((2 * CHUNK, CHUNK), (3 * CHUNK, 2 * CHUNK)):
        with pytest.raises(ContractViolation, match="no range"):
            vmm.back(address, size, slot)
    vmm.back(address, 3 * CHUNK, CHUNK)
    with pytest.raises(ContractViolation, match="no range"):
        vmm.back(vmm.reserve(CHUNK), CHUNK, CHUNK)


def test_a_device_that_counts_less_than_is_held_is_a_violation(driver: FakeCudaDriver, vmm: CudaVmm) -> None:
    """The driver's free memory is checked against the backend's own count."""
    handle = vmm.create(2 * CHUNK)
    vmm.check_device()
    driver.cuMemRelease(handle.id)
    with pytest.raises(ContractViolation, match=f"{2 * CHUNK} bytes are held, the device counts 0 taken"):
        vmm.check_device()


def test_close_gives_everything_back(driver: FakeCudaDriver, vmm: CudaVmm) -> None:
    """After close the driver has every chunk, address, stream and context back, mapped or not."""
    vmm.map(vmm.reserve(4 * CHUNK), vmm.create(2 * CHUNK))
    vmm.create(CHUNK)
    vmm.close()
    assert driver.held == 0 and driver.retained == 0
    assert not driver.reserved and not driver.mappings and not driver.streams and not driver.contexts
    assert vmm.held_bytes() == 0


def test_close_goes_on_where_the_driver_refuses(
    driver: FakeCudaDriver, vmm: CudaVmm, caplog: pytest.LogCaptureFixture
) -> None:
    """One refusal is logged and does not keep the other chunks from going back."""
    vmm.create(CHUNK)
    vmm.create(CHUNK)
    driver.fail_at("cuMemRelease", 1, ILLEGAL)
    with caplog.at_level(logging.WARNING):
        vmm.close()
    assert driver.held == CHUNK and driver.retained == 0
    assert "cuMemRelease" in caplog.text


def test_a_device_that_is_not_there_is_a_setting(driver: FakeCudaDriver) -> None:
    """An unknown ordinal, a missing driver and a device without virtual memory are SettingsErrors that say so."""
    with pytest.raises(SettingsError, match=r"device 3 cannot be used.*INVALID_DEVICE.*nvidia-smi"):
        CudaVmm(3, driver)
    driver.fail_at("cuInit", 1, Result.CUDA_ERROR_NO_DEVICE)
    with pytest.raises(SettingsError, match="CUDA_ERROR_NO_DEVICE"):
        CudaVmm(0, driver)
    for attribute in list(driver.attributes):
        driver.attributes[attribute] = 0
        with pytest.raises(SettingsError, match=attribute.name):
            CudaVmm(0, driver)
        driver.attributes[attribute] = 1
    driver.fail_at("cuStreamCreate", 1, OOM)
    with pytest.raises(OutOfDeviceMemory):
        CudaVmm(0, driver)
    assert driver.retained == 0


def test_without_cuda_python_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where cuda-python is missing, the error says what to install."""
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(SettingsError, match=r"ellm-cluster\[gpu\]"):
        CudaVmm()


@given(st.lists(st.tuples(st.sampled_from(["create", "map", "unmap", "release", "fail"]), st.integers(0, 7))))
def test_pool_ledger_and_driver_agree_whatever_happens(moves: list[tuple[str, int]]) -> None:
    """After any sequence of calls, some of them refused, the driver holds what held_bytes says, and nothing faults."""
    driver = FakeCudaDriver(CHUNK, 6 * CHUNK)
    vmm = CudaVmm(driver=driver)
    base = vmm.reserve(8 * CHUNK)
    handles, mapped = [], {}
    steps = ["cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemsetD8Async", "cuMemRelease", "cuMemUnmap"]
    for move, at in moves:
        address = base + at * CHUNK
        try:
            if move == "fail":
                driver.fail_no_more()  # one refusal at a time: an undo that is refused too has its own test
                driver.fail_at(steps[at % len(steps)], 1, OOM)
            elif move == "create":
                handles.append(vmm.create(CHUNK))
            elif move == "map" and handles and address not in mapped:
                vmm.map(address, handles[0])
                mapped[address] = handles.pop(0)
                assert driver.memory(address) == bytes(CHUNK)
            elif move == "unmap" and address in mapped:
                vmm.unmap(address, CHUNK)
                handles.append(mapped.pop(address))
            elif move == "release" and handles:
                vmm.release(handles[0])
                handles.pop(0)
        except OutOfDeviceMemory:
            driver.fail_no_more()
        stuck = len(driver.mappings) - len(mapped)  # a window that the driver refused to empty
        assert vmm.held_bytes() == (len(handles) + len(mapped) + stuck) * CHUNK == driver.held
        assert 0 <= stuck <= 1 and set(mapped) <= set(driver.mappings)
    assert not driver.faults
    driver.fail_no_more()
    vmm.close()
    assert driver.held == 0


def test_a_chunk_pool_over_the_gpu_conserves_its_bytes(driver: FakeCudaDriver, vmm: CudaVmm) -> None:
    """The pool's own check holds over this backend: what the pool owns is what the driver has committed."""
    pool = ChunkPool(vmm, CHUNK, limit_chunks=16)
    chunks = pool.take(ChunkOwner.KV_CACHE, 5)
    pool.give(ChunkOwner.KV_CACHE, chunks[:2])
    pool.check_conservation()
    assert driver.held == 5 * CHUNK
    pool.trim()
    pool.check_conservation()
    assert driver.held == 3 * CHUNK
