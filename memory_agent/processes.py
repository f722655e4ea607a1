"""Other processes of this host: when they end, and what they hold, as the kernel tells it (Linux).

A process is known by its id and its start time together, because ids are used again.
"""

import os
import select
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

SHM = Path("/dev/shm")
_SEGMENTS = ("psm_", "sem.mp-")
"""What Python's multiprocessing calls its shared memory and its semaphores, before a random part."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_ST_BLOCK_BYTES = 512
"""Unit of st_blocks, whatever the file system's block size (stat(2))."""
_START_TIME_FIELD = 22
"""Field of /proc/<pid>/stat, counted from 1 (proc_pid_stat(5))."""

Key = TypeVar("Key", bound=Hashable)


def start_time(pid: int) -> int:
    """Start of the process in clock ticks since boot. Raises ProcessLookupError where there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            raw = stat.read()
    except FileNotFoundError as error:
        raise ProcessLookupError(f"no process {pid}") from error
    # The command name, in parentheses, may itself contain spaces and parentheses: count from the last one.
    return int(raw[raw.rindex(b")") + 2 :].split()[_START_TIME_FIELD - 3])


def file_bytes(pid: int, fd: int) -> int:
    """Bytes really held by the file behind descriptor ``fd`` of process ``pid``; 0 where either is gone or not ours."""
    try:
        return os.stat(f"/proc/{pid}/fd/{fd}").st_blocks * _ST_BLOCK_BYTES
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        # An exiting process has lost its credentials or its descriptors already, but still has its directory.
        return 0


def resident_bytes(pid: int) -> int:
    """Resident set of the process, shared pages included; 0 where it is gone."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as statm:
            return int(statm.read().split()[1]) * _PAGE_BYTES
    except (FileNotFoundError, ProcessLookupError):
        return 0


def shared_segments(pids: Iterable[int]) -> set[Path]:
    """Shared memory and semaphores of Python's multiprocessing that these processes have mapped: files that stay where
    the processes are killed."""
    inodes = {inode for pid in pids for inode in _shared_inodes(pid)}
    return {file for file in SHM.iterdir() if file.name.startswith(_SEGMENTS) and _inode(file) in inodes}


def _shared_inodes(pid: int) -> set[int]:
    """Inodes of the shared memory that the process has mapped. Not names: a semaphore is mapped by a former one."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return {int(line.split(maxsplit=5)[4]) for line in lines if f" {SHM}/" in line}


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


class ExitWatch(Generic[Key]):
    """Notices the exit of processes that are not our children, through pidfds: one system call asks for all of them.

    A stopped or silent process has not exited. A zombie has: its memory is back already.
    """

    def __init__(self) -> None:
        self._poll = select.poll()
        self._fds: dict[Key, int] = {}
        self._keys: dict[int, Key] = {}

    def add(self, key: Key, pid: int, started: int = 0) -> int:
        """Watch ``pid`` under ``key`` and return its start time.

        started: the start time it must have, 0 for any. Raises ProcessLookupError where the process is gone or its id
        belongs to another one now; nothing is watched then. A key that is watched already is watched anew.
        """
        self.remove(key)
        fd = os.pidfd_open(pid)
        try:
            # Read after the open: if this start time is right, the descriptor refers to that very process.
            found = start_time(pid)
            if started not in (0, found):
                raise ProcessLookupError(f"process {pid} started at tick {found}, not {started}: the id was used again")
        except ProcessLookupError:
            os.close(fd)
            raise
        self._poll.register(fd, select.POLLIN)
        self._fds[key] = fd
        self._keys[fd] = key
        return found

    def collect(self) -> list[Key]:
        """Keys of the processes that have exited since the last call; they are not watched any more. Never blocks."""
        exited = [self._keys[fd] for fd, _ in self._poll.poll(0)]
        for key in exited:
            self.remove(key)
        return exited

    def remove(self, key: Key) -> None:
        """Stop watching ``key``; nothing happens where it is not watched."""
        fd = self._fds.pop(key, None)
        if fd is not None:
            del self._keys[fd]
            self._poll.unregister(fd)
            os.close(fd)

    def close(self) -> None:
        for key in list(self._fds):
            self.remove(key)
