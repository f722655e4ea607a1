"""VirtualTensor: slots of a fixed range of addresses."""

import ctypes

import pytest

from memory_agent.chunks import ChunkOwner, ChunkPool
from memory_agent.errors import OutOfDeviceMemory, SettingsError
from memory_agent.fake_vmm import FakeVmm
from memory_agent.host_vmm import HostVmm
from memory_agent.virtual_tensor import VirtualTensor
from memory_agent.vmm import ContractViolation

PAGE = 4096


def test_slots_keep_their_own_data_whatever_chunk_order() -> None:
    """Each mapped slot is memory of its own, at address + slot * chunk, whichever chunk is behind it."""
    vmm = HostVmm("ellm-test", 8 * PAGE)
    tensor = VirtualTensor(vmm, 8 * PAGE, PAGE)
    chunks = ChunkPool(vmm, PAGE, 8).take(ChunkOwner.KV_CACHE, 3)
    for slot, chunk in zip((6, 0, 3), chunks, strict=True):
        tensor.map_slot(slot, chunk)
        ctypes.memset(tensor.address + slot * PAGE, slot + 1, PAGE)
    assert tensor.mapped_slots == {0, 3, 6}
    assert all(ctypes.string_at(tensor.address + s * PAGE, PAGE) == bytes([s + 1]) * PAGE for s in (0, 3, 6))
    assert tensor.unmap_slot(3) is chunks[2]
    assert tensor.mapped_bytes == 2 * PAGE
    vmm.close()


def test_the_last_slot_may_reach_over_the_end() -> None:
    """A size that is no multiple of the chunk gets a whole last slot."""
    tensor = VirtualTensor(FakeVmm(16, 1600), 100, 32)
    assert (tensor.slot_count, tensor.size_bytes) == (4, 100)


def test_slots_outside_and_wrong_chunks_are_violations() -> None:
    """A slot that does not exist, one that is taken, one that is empty, and a chunk of another size are refused."""
    vmm = FakeVmm(16, 1600)
    tensor = VirtualTensor(vmm, 128, 32)
    first, second = ChunkPool(vmm, 32, 4).take(ChunkOwner.KV_CACHE, 2)
    tensor.map_slot(0, first)
    for slot in (-1, 4, 0):
        with pytest.raises(ContractViolation):
            tensor.map_slot(slot, second)
    for slot in (-1, 4, 1):
        with pytest.raises(ContractViolation):
            tensor.unmap_slot(slot)
    with pytest.raises(ContractViolation, match="16 bytes"):
        tensor.map_slot(1, ChunkPool(vmm, 16, 9).take(ChunkOwner.KV_CACHE, 1)[0])
    assert tensor.mapped_slots == {0}


def test_a_refused_map_or_unmap_changes_nothing() -> None:
    """After a refusal of the system the slot is as it was, and the call works when repeated."""
    vmm = FakeVmm(16, 1600)
    tensor = VirtualTensor(vmm, 128, 32)
    (chunk,) = ChunkPool(vmm, 32, 4).take(ChunkOwner.KV_CACHE, 1)
    vmm.fail_at("map", 1)
    with pytest.raises(OutOfDeviceMemory):
        tensor.map_slot(2, chunk)
    assert not tensor.mapped_slots
    tensor.map_slot(2, chunk)
    vmm.fail_at("unmap", 1)
    with pytest.raises(OutOfDeviceMemory):
        tensor.unmap_slot(2)
    assert tensor.mapped_slots == {2}
    assert tensor.unmap_slot(2) is chunk


def test_more_slots_than_the_backend_can_map_are_refused_with_what_would_fit() -> None:
    """A tensor that could run out of memory mappings is refused at the start, with the size that would do."""
    vmm = FakeVmm(16, 1600, max_mappings=10)
    with pytest.raises(SettingsError, match=r"11 memory mappings and 10 are left; at most 320 bytes .* by 1"):
        VirtualTensor(vmm, 11 * 32, 32)
    assert VirtualTensor(vmm, 320, 32).slot_count == 10


@pytest.mark.parametrize(("size", "chunk"), [(0, 32), (128, 0), (128, 24)])
def test_impossible_sizes_are_refused(size: int, chunk: int) -> None:
    """Sizes that are not positive, and chunks that are no multiple of the granularity, are settings errors."""
    with pytest.raises(SettingsError):
        VirtualTensor(FakeVmm(16, 1600), size, chunk)


def test_close_needs_every_slot_unmapped() -> None:
    """The addresses go back only when nothing is mapped any more."""
    vmm = FakeVmm(16, 1600)
    tensor = VirtualTensor(vmm, 128, 32)
    tensor.map_slot(1, ChunkPool(vmm, 32, 4).take(ChunkOwner.KV_CACHE, 1)[0])
    with pytest.raises(ContractViolation, match="still mapped"):
        tensor.close()
    tensor.unmap_slot(1)
    tensor.close()
