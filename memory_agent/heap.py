"""The C library's heap: on a CPU, activations live in it, and freed ones stay there until somebody asks for them back.

    RssAnon    |------ what stays: weights, libraries ------|---- past activations ----|
                                                          floor                      held      after trim: floor

glibc can keep what a process frees for its next allocation, or give every large buffer back at once. Keeping is a third
faster for vLLM, because fresh pages cost faults; giving back takes less than half of the memory, because nothing lies
between buffers in use, and its peak follows from the work alone.
"""

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

_libc = ctypes.CDLL(None)
_malloc_trim = getattr(_libc, "malloc_trim", None)
_mallopt = getattr(_libc, "mallopt", None)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD, _NEVER = 32 << 20, (1 << 31) - 1
_LARGE_BUFFER = 256 << 10
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_FIELDS = re.compile(r"^(VmHWM|RssAnon|RssFile|RssShmem):\s+(\d+) kB", re.MULTILINE)


def heap_can_be_told() -> bool:
    """Whether the C library has what ``trim_heap`` and ``keep_freed`` need."""
    return _malloc_trim is not None and _mallopt is not None


def trim_heap() -> bool:
    """Give free pages of the whole heap back to the operating system; False where the C library cannot."""
    if _malloc_trim is None:
        return False
    _malloc_trim(0)
    return True


def keep_freed(keep: bool) -> bool:
    """From now on the heap keeps what is freed, or gives large buffers back at once; False where the C library cannot
    be told."""
    if _mallopt is None:
        return False
    mapped, trimmed = (_LARGEST_MMAP_THRESHOLD, _NEVER) if keep else (_LARGE_BUFFER, _LARGE_BUFFER)
    return bool(_mallopt(_M_MMAP_THRESHOLD, mapped) and _mallopt(_M_TRIM_THRESHOLD, trimmed))


@dataclass(frozen=True)
class HeapUse:
    """Bytes of a process's heap above its floor, by the operating system.

    Attributes:
        peak_bytes: most at any moment since the last ``restart``.
        held_bytes: now; a trim would give it back.
    """

    peak_bytes: int
    held_bytes: int


class HeapProbe:
    """Measures how much heap a piece of work takes. One a process, because the kernel keeps one peak a process.

    The floor is what remained after the last trim. Memory files that are mapped do not count.
    """

    def __init__(self) -> None:
        self.floor_bytes = 0
        """What is no free heap: memory in use, caches, work buffers of libraries."""
        self.trim()

    def trim(self) -> None:
        """Trim the heap; what is left is the new floor."""
        trim_heap()
        self.floor_bytes = _memory()["RssAnon"]
        self.restart()

    def restart(self) -> None:
        """Forget the peak so far."""
        _CLEAR_REFS.write_text(_RESET_PEAK)

    def read(self) -> HeapUse:
        """The heap's use since the last ``restart``. Files mapped meanwhile must not have shrunk."""
        memory = _memory()
        held = memory["RssAnon"] - self.floor_bytes
        peak = memory["VmHWM"] - memory["RssFile"] - memory["RssShmem"] - self.floor_bytes
        return HeapUse(peak_bytes=max(peak, held, 0), held_bytes=max(held, 0))


def _memory() -> dict[str, int]:
    return {name: int(kib) * 1024 for name, kib in _FIELDS.findall(_STATUS.read_text())}
