"""HostVmm against the operating system: what is really committed, mapped, readable and given back."""

import ctypes
import faulthandler
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_agent.errors import OutOfDeviceMemory, SettingsError
from memory_agent.host_vmm import FreeRanges, HostVmm
from memory_agent.vmm import ContractViolation

MIB = 1024 * 1024


@pytest.fixture
def vmm() -> Iterator[HostVmm]:
    backend = HostVmm("ellm-test", 64 * MIB)
    yield backend
    backend.close()


def killed_by(address: int) -> int | None:
    """The signal that kills a child which reads one byte at ``address``; None when it survives."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        ctypes.string_at(address, 1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else None


def resident_shared_bytes() -> int:
    """Resident shared-memory bytes of this process (RssShmem)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssShmem"))
    return int(line.split()[1]) * 1024


def test_create_commits_before_the_first_touch(vmm: HostVmm) -> None:
    """The memory file grows by the whole chunk at create, although nobody has touched a page."""
    vmm.create(MIB)
    assert os.fstat(vmm.fd).st_blocks * 512 == MIB


def test_a_touch_of_an_unmapped_slot_kills_with_sigsegv(vmm: HostVmm) -> None:
    """Reserved, and unmapped again, addresses kill the process that touches them; mapped ones do not."""
    address, handle = vmm.reserve(2 * MIB), vmm.create(MIB)
    assert killed_by(address) == signal.SIGSEGV
    vmm.map(address, handle)
    assert killed_by(address) is None
    assert killed_by(address + MIB) == signal.SIGSEGV
    vmm.unmap(address, MIB)
    assert killed_by(address) == signal.SIGSEGV


def test_data_stays_with_the_chunk(vmm: HostVmm) -> None:
    """What was written through one address is read through the next address that the chunk is mapped at."""
    address, handle = vmm.reserve(2 * MIB), vmm.create(MIB)
    vmm.map(address, handle)
    ctypes.memset(address, 0xAB, MIB)
    vmm.unmap(address, MIB)
    vmm.map(address + MIB, handle)
    assert ctypes.string_at(address + MIB, MIB) == b"\xab" * MIB


def test_memory_committed_again_reads_zero(vmm: HostVmm) -> None:
    """A chunk that reuses the file range of a released one shows nothing of the old data."""
    address, old = vmm.reserve(MIB), vmm.create(MIB)
    vmm.map(address, old)
    ctypes.memset(address, 0xAB, MIB)
    vmm.unmap(address, MIB)
    vmm.release(old)
    new = vmm.create(MIB)
    assert new.id == old.id
    vmm.map(address, new)
    assert ctypes.string_at(address, MIB) == bytes(MIB)


def test_the_process_shrinks_when_a_chunk_is_released(vmm: HostVmm) -> None:
    """The resident memory of this process, as the kernel counts it, grows with a touched chunk and falls again."""
    address, handle = vmm.reserve(16 * MIB), vmm.create(16 * MIB)
    vmm.map(address, handle)
    before = resident_shared_bytes()
    ctypes.memset(address, 1, 16 * MIB)
    assert resident_shared_bytes() - before == 16 * MIB
    vmm.unmap(address, 16 * MIB)
    vmm.release(handle)
    assert resident_shared_bytes() == before
    assert vmm.held_bytes() == 0


def test_others_can_count_the_bytes_from_outside(vmm: HostVmm) -> None:
    """Process id and descriptor number suffice to read the held bytes of another process."""
    vmm.create(3 * MIB)
    assert os.stat(f"/proc/{os.getpid()}/fd/{vmm.fd}").st_blocks * 512 == 3 * MIB


def test_the_memory_file_is_not_inherited_by_new_programs(vmm: HostVmm) -> None:
    """The descriptor closes on exec, so that no program started later keeps the memory alive."""
    assert not os.get_inheritable(vmm.fd)


def test_close_gives_addresses_and_memory_back() -> None:
    """After close nothing of the pool is left in the process's maps, though chunks were mapped."""
    vmm = HostVmm("ellm-test-close", 4 * MIB)
    address = vmm.reserve(4 * MIB)
    vmm.map(address, vmm.create(MIB))
    assert "ellm-test-close" in Path("/proc/self/maps").read_text()
    vmm.close()
    assert "ellm-test-close" not in Path("/proc/self/maps").read_text()
    assert killed_by(address) == signal.SIGSEGV


def test_a_released_range_is_merged_and_reused(vmm: HostVmm) -> None:
    """Small chunks given back in any order make room for one large chunk: the file does not fragment for good."""
    handles = [vmm.create(MIB) for _ in range(64)]
    for handle in handles[1::2] + handles[::2]:
        vmm.release(handle)
    assert vmm.create(64 * MIB).size_bytes == 64 * MIB


class RefusingVmm(HostVmm):
    """A host whose kernel commits nothing while ``refuses`` is set."""

    refuses = False

    def _fallocate(self, mode: int, offset: int, size_bytes: int) -> None:
        if self.refuses:
            raise OutOfDeviceMemory("refused")
        super()._fallocate(mode, offset, size_bytes)


def test_a_refused_commit_or_release_loses_nothing() -> None:
    """A refused commit leaves the file range free, a refused release the chunk alive; both work when repeated."""
    vmm = RefusingVmm("ellm-test", 2 * MIB)
    vmm.refuses = True
    with pytest.raises(OutOfDeviceMemory, match="refused"):
        vmm.create(2 * MIB)
    vmm.refuses = False
    handle = vmm.create(2 * MIB)
    vmm.refuses = True
    with pytest.raises(OutOfDeviceMemory, match="refused"):
        vmm.release(handle)
    vmm.refuses = False
    assert vmm.held_bytes() == 2 * MIB
    vmm.release(handle)
    assert vmm.held_bytes() == 0
    vmm.close()


def test_addresses_and_bytes_beyond_the_limits_are_refused_with_the_cause(vmm: HostVmm) -> None:
    """Too many addresses for the process, or more bytes than the pool has, raise OutOfDeviceMemory and take nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (512 * MIB, hard))
    try:
        with pytest.raises(OutOfDeviceMemory, match="address space"):
            vmm.reserve(1 << 40)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    with pytest.raises(OutOfDeviceMemory, match="no 134217728 bytes left"):
        vmm.create(128 * MIB)
    assert vmm.held_bytes() == 0
    vmm.create(64 * MIB)


@pytest.mark.parametrize("max_bytes", [0, -1, 1 << 63, (1 << 63) - 1])
def test_an_impossible_size_is_a_settings_error(max_bytes: int) -> None:
    """A pool that the system cannot make a file for is refused when it is made."""
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SettingsError):
        HostVmm("ellm-test", max_bytes)
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_capacity_of_half_a_page_is_rounded_up() -> None:
    """The capacity is rounded up to whole granules."""
    vmm = HostVmm("ellm-test", 1)
    assert vmm.create(vmm.granularity_bytes).size_bytes == vmm.granularity_bytes
    vmm.close()


def test_violations_reach_no_memory(vmm: HostVmm) -> None:
    """A map over another process mapping is stopped before the kernel would have replaced it."""
    victim = ctypes.create_string_buffer(b"precious", 8192)
    inside = (ctypes.addressof(victim) + 4095) // 4096 * 4096
    with pytest.raises(ContractViolation):
        vmm.map(inside, vmm.create(4096))
    assert victim.value == b"precious"


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9), st.integers(0, 1000)), max_size=60))
def test_free_ranges_never_overlap_and_never_get_lost(operations: list[tuple[bool, int, int]]) -> None:
    """Over any takes and gives, live ranges are disjoint and inside, a refusal is true, and all comes back."""
    size, ranges = 40, FreeRanges(40)
    live: list[tuple[int, int]] = []
    for take, length, pick in operations:
        used = {unit for start, taken in live for unit in range(start, start + taken)}
        if take:
            start = ranges.take(length)
            fits = any(used.isdisjoint(range(at, at + length)) for at in range(size - length + 1))
            assert (start is not None) == fits
            if start is not None:
                assert used.isdisjoint(range(start, start + length)) and 0 <= start <= size - length
                live.append((start, length))
        elif live:
            ranges.give(*live.pop(pick % len(live)))
    for start, length in live:
        ranges.give(start, length)
    assert ranges.take(size) == 0
