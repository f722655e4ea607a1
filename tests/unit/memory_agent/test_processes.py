"""Watching other processes: exits, reused ids, and what they hold."""

import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from memory_agent.processes import ExitWatch, file_bytes, resident_bytes, start_time


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def watch() -> Iterator[ExitWatch[str]]:
    watch: ExitWatch[str] = ExitWatch()
    yield watch
    watch.close()


def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def test_exit_is_noticed_once(sleeper: subprocess.Popen[bytes], watch: ExitWatch[str]) -> None:
    """A killed process is reported by one collect, also before anybody has reaped it, and by no later one."""
    watch.add("a", sleeper.pid)
    assert watch.collect() == []
    sleeper.kill()
    found: list[str] = []

    def collected() -> bool:
        found.extend(watch.collect())
        return bool(found)

    assert eventually(collected)
    assert found == ["a"]
    assert watch.collect() == []


def test_stopped_process_has_not_exited(sleeper: subprocess.Popen[bytes], watch: ExitWatch[str]) -> None:
    """SIGSTOP is silence, not an exit."""
    watch.add("a", sleeper.pid)
    sleeper.send_signal(signal.SIGSTOP)
    assert eventually(lambda: state_of(sleeper.pid) == "T")
    assert watch.collect() == []


def test_process_without_start_is_gone(watch: ExitWatch[str]) -> None:
    """A pid that belongs to nobody cannot be watched, and leaves nothing behind."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ProcessLookupError):
        watch.add("a", dead.pid)
    with pytest.raises(ProcessLookupError):
        start_time(dead.pid)
    assert len(os.listdir("/proc/self/fd")) == before


def test_reused_pid_is_recognised(sleeper: subprocess.Popen[bytes], watch: ExitWatch[str]) -> None:
    """The same id with another start time is another process: refused, as if ours had exited."""
    started = watch.add("a", sleeper.pid)
    assert started == start_time(sleeper.pid)
    assert watch.add("b", sleeper.pid, started) == started
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ProcessLookupError, match="used again"):
        watch.add("c", sleeper.pid, started - 1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_start_time_with_a_hostile_name() -> None:
    """A command name with spaces and parentheses does not shift the fields of /proc/<pid>/stat."""
    code = "import ctypes, sys; ctypes.CDLL(None).prctl(15, b'a) R (b c', 0, 0, 0); print(flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        with open(f"/proc/{process.pid}/comm") as comm:
            assert comm.read() == "a) R (b c\n"
        uptime_ticks = time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")
        assert start_time(os.getpid()) <= start_time(process.pid) <= uptime_ticks
    finally:
        process.communicate()


def test_removed_key_is_not_reported(sleeper: subprocess.Popen[bytes], watch: ExitWatch[str]) -> None:
    """A process nobody watches any more exits unnoticed, and its descriptor is closed."""
    before = len(os.listdir("/proc/self/fd"))
    watch.add("a", sleeper.pid)
    watch.add("a", sleeper.pid)
    watch.remove("a")
    watch.remove("never watched")
    assert len(os.listdir("/proc/self/fd")) == before
    sleeper.kill()
    sleeper.wait()
    assert watch.collect() == []


def test_file_bytes_follow_the_memory_really_held() -> None:
    """Of a sparse memory file only the written pages count, and a punched hole counts no more."""
    fd = os.memfd_create("test")
    try:
        os.ftruncate(fd, 1 << 30)
        assert file_bytes(os.getpid(), fd) == 0
        os.pwrite(fd, b"x" * (1 << 20), 1 << 25)
        assert file_bytes(os.getpid(), fd) == 1 << 20
    finally:
        os.close(fd)
    assert file_bytes(os.getpid(), fd) == 0


def test_gone_processes_hold_nothing() -> None:
    """Sampling a process that is gone, reaped or not, gives 0 and no error."""
    process = subprocess.Popen(["true"])
    assert eventually(lambda: state_of(process.pid) == "Z")
    assert (file_bytes(process.pid, 0), resident_bytes(process.pid)) == (0, 0)
    process.wait()
    assert (file_bytes(process.pid, 0), resident_bytes(process.pid)) == (0, 0)


def test_resident_bytes_count_touched_memory() -> None:
    """Touching 32 MiB raises the resident set by about that."""
    before = resident_bytes(os.getpid())
    with mmap.mmap(-1, 32 << 20) as block:  # not of the heap, which may hold as much from earlier tests
        block.write(bytes([1]) * (32 << 20))
        assert 31 << 20 < resident_bytes(os.getpid()) - before < 80 << 20


def state_of(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]
