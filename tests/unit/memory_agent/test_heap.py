"""The C library's heap gives memory back when asked."""

import subprocess
import sys

PROGRAM = """
import ctypes, psutil
from memory_agent.heap import trim_heap

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = (ctypes.c_void_p,)
libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
PIECE = 64 << 10
pieces = [libc.malloc(PIECE) for _ in range(1600)]  # 100 MiB, none of it large enough for a mapping of its own
for piece in pieces:
    libc.memset(piece, 1, PIECE)
last = pieces.pop()  # keeps the top of the heap in use, so that glibc itself gives nothing back
for piece in pieces:
    libc.free(piece)
kept = psutil.Process().memory_info().rss
assert trim_heap()
print(kept - psutil.Process().memory_info().rss)
"""


def test_trimming_returns_free_memory_below_memory_in_use() -> None:
    """Most of 100 MiB, measured by the process's resident bytes."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 90 << 20


PROBE = """
import numpy
from memory_agent.heap import HeapProbe, keep_freed

MIB = 1 << 20

def use_some():
    probe.restart()
    buffers = [numpy.ones(8 * MIB, numpy.int8) for _ in range(12)]
    del buffers
    use = probe.read()
    return use.peak_bytes // MIB, use.held_bytes // MIB

assert keep_freed(False)
probe = HeapProbe()
exact = use_some()
assert keep_freed(True)
kept = use_some()
probe.trim()
print(*exact, *kept, probe.read().held_bytes // MIB)
"""


def test_the_heap_keeps_or_gives_back_and_the_probe_sees_it() -> None:
    """Within a few MiB: the kernel counts pages in batches."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    exact_peak, exact_held, kept_peak, kept_held, trimmed = map(int, done.stdout.split())
    assert 94 <= exact_peak <= 104
    assert exact_held <= 4
    assert 94 <= kept_peak <= 104
    assert kept_held >= 80
    assert trimmed <= 4
