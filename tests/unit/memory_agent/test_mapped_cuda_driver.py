"""The fake driver with real memory behind its addresses: what other tests rely on."""

import ctypes
import signal
import subprocess
import sys

import pytest

from memory_agent.cuda_vmm import CudaVmm
from tests.unit.memory_agent.mapped_cuda_driver import MappedCudaDriver

PAGE = 4096


def read(address: int, size: int = 4) -> bytes:
    return ctypes.string_at(address, size)


def test_what_is_written_through_an_address_moves_with_its_chunk() -> None:
    """A chunk is cleared, keeps its data over a change of address, and scratch stands where it was."""
    driver = MappedCudaDriver(PAGE, 8 * PAGE)
    vmm = CudaVmm(driver=driver)
    address = vmm.reserve(3 * PAGE)
    vmm.back(address, 3 * PAGE, PAGE)
    vmm.map(address, chunk := vmm.create(PAGE))
    assert read(address, PAGE) == bytes(PAGE)
    ctypes.memmove(address, b"data", 4)
    ctypes.memmove(address + PAGE, b"junk", 4)
    vmm.unmap(address, PAGE)
    vmm.map(address + PAGE, chunk)
    assert (read(address), read(address + PAGE), read(address + 2 * PAGE)) == (b"junk", b"data", b"junk")
    vmm.close()
    assert driver.held == 0


@pytest.mark.parametrize("backed", [True, False])
def test_only_scratch_makes_a_stray_touch_harmless(backed: bool) -> None:
    """The process that reads addresses without a chunk dies, unless their range is backed."""
    program = f"""
import ctypes
from memory_agent.cuda_vmm import CudaVmm
from tests.unit.memory_agent.mapped_cuda_driver import MappedCudaDriver
vmm = CudaVmm(driver=MappedCudaDriver({PAGE}, {4 * PAGE}))
address = vmm.reserve({PAGE})
{f"vmm.back(address, {PAGE}, {PAGE})" if backed else ""}
assert ctypes.string_at(address, 4) == bytes(4)
"""
    status = subprocess.run([sys.executable, "-c", program], check=False).returncode
    assert status == (0 if backed else -signal.SIGSEGV)
