"""The C library's heap: on a CPU, activations live in it, and freed ones stay there until somebody asks for them back.

glibc keeps what a process frees for its next allocation. That is worth keeping while the engine works: giving every
large buffer back at once (``MALLOC_MMAP_THRESHOLD_``) costs a quarter of vLLM's throughput in page faults.
"""

import ctypes

_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


def trim_heap() -> bool:
    """Give free pages of the whole heap back to the operating system; False where the C library cannot."""
    if _malloc_trim is None:
        return False
    _malloc_trim(0)
    return True
