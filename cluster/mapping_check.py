"""Whether memory of this machine can be mapped and given back while engines run, as elastic memory needs it."""

import ctypes
import os

from cluster.finding import Finding, State
from memory_agent.cuda_driver import CudaDriver, CudaError
from memory_agent.errors import MemoryError_, SettingsError

_PROBE_BYTES = 1 << 20
_BLOCK_BYTES = 512
"""That st_blocks counts in, on every file system."""
_KEEP_SIZE, _PUNCH_HOLE = 1, 2


def gpu_mapping(index: int, driver: CudaDriver | None = None) -> Finding:
    """Whether the driver has virtual memory management for the GPU of that index."""
    try:
        cuda = driver or CudaDriver()
        cuda.call("cuInit", 0)
        version = cuda.call("cuDriverGetVersion")
        handle = cuda.call("cuDeviceGet", index)
        names = cuda.api.CUdevice_attribute
        able = cuda.call("cuDeviceGetAttribute", names.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, handle)
    except (SettingsError, CudaError, MemoryError_) as error:
        return Finding("mapping", State.FAILED, str(error), "install NVIDIA's driver for this GPU, and cuda-python")
    found = f"CUDA driver API {version // 1000}.{version % 1000 // 10}"
    if able:
        return Finding("mapping", State.OK, f"{found}, maps and unmaps memory")
    remedy = "use another GPU, or static memory (elastic: false)"
    return Finding("mapping", State.FAILED, f"{found}, no virtual memory management", remedy)


def host_mapping() -> Finding:
    """Whether the kernel commits pages of a memory file and takes them back when a hole is punched, as elastic memory
    on a CPU needs it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64
    try:
        fd = os.memfd_create("ellm-doctor")
    except OSError as error:
        return Finding("mapping", State.FAILED, f"no memory files: {error.strerror}", "allow memfd_create (seccomp)")
    try:
        os.ftruncate(fd, _PROBE_BYTES)
        os.posix_fallocate(fd, 0, _PROBE_BYTES)
        taken = os.fstat(fd).st_blocks * _BLOCK_BYTES
        done = libc.fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, 0, _PROBE_BYTES)
        left = os.fstat(fd).st_blocks * _BLOCK_BYTES
    except OSError as error:
        return Finding("mapping", State.FAILED, f"fallocate: {error.strerror}", "free memory, or raise its limit")
    finally:
        os.close(fd)
    if done != 0 or taken < _PROBE_BYTES or left:
        found = f"of {_PROBE_BYTES} bytes {taken} were committed and {left} are left after a hole was punched"
        return Finding("mapping", State.FAILED, found, "use a Linux kernel, not an emulation of one (gVisor)")
    return Finding("mapping", State.OK, "memory files grow and give back")
