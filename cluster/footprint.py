"""What a cluster on this host leaves outside of its own memory, and how all of it is removed.

    processes        every descendant of this one; orphans too, because this process adopts them (a "child subreaper")
    shared memory    /dev/shm/ellm-<cluster id>-*, and Python's psm_* and sem.mp-* that our processes have mapped
    temporary files  one folder, ellm-<cluster id>, with Ray's sockets and logs

Where the owner was killed outright, the kernel ends most of Ray with it, and the next start removes what was left.
"""

import contextlib
import ctypes
import os
import secrets
import shutil
import tempfile
from collections.abc import Set
from pathlib import Path

import psutil

from memory_agent.processes import SHM, shared_segments

_PREFIX = "ellm-"
_OWNER_FILE = "owner.pid"
_SEGMENTS_FILE = "segments"
_PR_SET_CHILD_SUBREAPER = 36
_KILL_ROUNDS = 3
_KILL_PATIENCE_S = 5.0
_MAX_TEMP_ROOT = 30
"""Ray puts Unix sockets below its folder; their whole path may have 107 characters, of which its own part takes about
70."""


class Footprint:
    """The processes and files of one cluster. Made before anything is started; ``clear`` ends and removes them all."""

    def __init__(self) -> None:
        _adopt_orphans()
        self.cluster_id = secrets.token_hex(4)
        self._not_ours = {child.pid for child in psutil.Process().children(recursive=True)}
        self._started: set[int] | None = None
        """Children that this process has started itself, once all of them run: it waits for these elsewhere."""
        self.folder = _temp_root() / f"{_PREFIX}{self.cluster_id}"
        self.folder.mkdir(mode=0o700)
        (self.folder / _OWNER_FILE).write_text(str(os.getpid()), encoding="ascii")

    def processes(self) -> list[psutil.Process]:
        """Living descendants that were started since this footprint was made."""
        children = psutil.Process().children(recursive=True)
        return [child for child in children if child.pid not in self._not_ours and _alive(child)]

    def ray_lives(self) -> bool:
        """False where Ray's control store or its node process is not there: then no call into Ray comes back."""
        return {_name(process) for process in self.processes()} >= {"gcs_server", "raylet"}

    def note_segments(self) -> None:
        """Write down the shared memory that our processes have mapped, to remove it even where they are killed."""
        file = self.folder / _SEGMENTS_FILE
        known = set(file.read_text(encoding="utf-8").splitlines()) if file.exists() else set()
        mapped = {file.name for file in shared_segments(process.pid for process in self.processes())}
        file.write_text("\n".join(sorted(known | mapped)), encoding="utf-8")

    def clear(self, patience_s: float = 5.0) -> list[str]:
        """End every process, gently first, and remove every file. Returns the commands of processes that had to be
        killed."""
        self.note_segments()
        left = self.processes()
        for process in left:
            _signal(process, kill=False)
        psutil.wait_procs(left, timeout=patience_s)
        killed = []
        for _ in range(_KILL_ROUNDS):  # again, because a dying process may leave children of its own
            left = self.processes()
            killed += [_command(process) for process in left]
            for process in left:
                _signal(process, kill=True)
            psutil.wait_procs(left, timeout=_KILL_PATIENCE_S)
        self._reap(self._not_ours)
        _remove(self.cluster_id, self.folder)
        return killed

    def reap_orphans(self) -> None:
        """Collect the dead among adopted children. To be called when all is started, and now and then from then on."""
        if self._started is None:
            self._started = {child.pid for child in psutil.Process().children()}
        self._reap(self._not_ours | self._started)

    def _reap(self, kept: Set[int]) -> None:
        """Collect children that ended by themselves, but these: in a container nobody else may do it after us."""
        for child in psutil.Process().children():
            if child.pid not in kept:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(child.pid, os.WNOHANG)


def remove_leftovers() -> list[str]:
    """End what is left of clusters whose owner is dead, and remove their files; returns their cluster ids."""
    removed = []
    for folder in _temp_root().glob(f"{_PREFIX}*/"):
        try:
            owner = int((folder / _OWNER_FILE).read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue  # not ours, or of another user
        if not psutil.pid_exists(owner):
            cluster_id = folder.name.removeprefix(_PREFIX)
            users = _users_of(folder)
            for process in users:
                _signal(process, kill=True)
            psutil.wait_procs(users, timeout=_KILL_PATIENCE_S)
            _remove(cluster_id, folder)
            removed.append(cluster_id)
    return removed


def _users_of(folder: Path) -> list[psutil.Process]:
    """Processes that have a file below ``folder`` open: of Ray's, some notice the end of the others late or never."""
    users = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):  # not ours to look into, or gone
            fds = Path(f"/proc/{process.pid}/fd")
            if any(str(fd.readlink()).startswith(f"{folder}/") for fd in fds.iterdir()):
                users.append(process)
    return users


def _remove(cluster_id: str, folder: Path) -> None:
    with contextlib.suppress(OSError):
        for name in (folder / _SEGMENTS_FILE).read_text(encoding="utf-8").splitlines():
            (SHM / name).unlink(missing_ok=True)
    for path in SHM.glob(f"{_PREFIX}{cluster_id}-*"):
        path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _temp_root() -> Path:
    chosen = Path(tempfile.gettempdir())
    return chosen if len(str(chosen)) <= _MAX_TEMP_ROOT else Path("/tmp")


def _adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies (prctl(2)). Linux only; elsewhere orphans are not
    found."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(process: psutil.Process, *, kill: bool) -> None:
    try:
        if kill:
            process.kill()
        else:
            process.terminate()
    except psutil.NoSuchProcess:
        pass


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def _command(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline()[:4])}"
    except psutil.Error:
        return str(process.pid)
