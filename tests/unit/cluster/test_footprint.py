"""Nothing of a cluster stays on the host."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from cluster.footprint import SHM, Footprint, remove_leftovers


def running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_orphans_are_ended(tmp_path: Path) -> None:
    """A process whose parent has died, in a session of its own, is found and ended like any other."""
    footprint = Footprint()
    note = tmp_path / "pid"
    subprocess.run(["bash", "-c", f"setsid sleep 1000 & echo $! > {note}"], check=True)
    orphan = int(note.read_text())
    assert running(orphan)
    assert footprint.clear() == []
    assert not psutil.pid_exists(orphan)


def test_dead_orphans_are_collected_and_own_children_are_not(tmp_path: Path) -> None:
    """While the cluster runs: what a killed process leaves does not pile up, and how our own child ended is ours to
    ask."""
    footprint = Footprint()
    own = subprocess.Popen(["bash", "-c", "read; exit 7"], stdin=subprocess.PIPE)
    footprint.reap_orphans()
    note = tmp_path / "pid"
    subprocess.run(["bash", "-c", f"setsid sleep 1000 & echo $! > {note}"], check=True)
    orphan = int(note.read_text())
    os.kill(orphan, signal.SIGKILL)
    assert own.stdin is not None
    own.stdin.close()
    deadline_s = time.monotonic() + 10
    while psutil.pid_exists(orphan) or running(own.pid):
        footprint.reap_orphans()
        assert time.monotonic() < deadline_s
    footprint.reap_orphans()
    assert own.wait() == 7
    footprint.clear()


def test_a_process_that_will_not_end_is_killed() -> None:
    """What ignores the polite signal is killed, and reported."""
    footprint = Footprint()
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(1000)"
    stubborn = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert stubborn.stdout is not None
    stubborn.stdout.readline()
    (killed,) = footprint.clear(patience_s=0.2)
    stubborn.stdout.close()
    assert str(stubborn.pid) in killed
    assert not running(stubborn.pid)


def test_earlier_children_are_left_alone() -> None:
    """A footprint ends only what was started after it."""
    earlier = subprocess.Popen(["sleep", "1000"])
    footprint = Footprint()
    later = subprocess.Popen(["sleep", "1000"])
    footprint.clear()
    assert (running(earlier.pid), running(later.pid)) == (True, False)
    for process in (earlier, later):
        process.kill()
        process.wait()


def test_files_and_shared_memory_are_removed() -> None:
    """The folder, shared memory of the cluster's name, and segments that a process of ours still had mapped."""
    footprint, other = Footprint(), Footprint()
    board = SHM / f"ellm-{footprint.cluster_id}-cpu.board"
    board.touch()
    foreign = SHM / f"ellm-{other.cluster_id}-cpu.board"
    foreign.touch()
    segment = SHM / f"psm_{footprint.cluster_id}"
    code = (
        "import mmap, multiprocessing, sys, time; file = open(sys.argv[1], 'wb+'); file.truncate(4096); "
        "segment = mmap.mmap(file.fileno(), 4096); lock = multiprocessing.get_context('spawn').Lock(); "
        "print(lock._semlock.name, flush=True); time.sleep(1000)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(segment)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    semaphore = SHM / f"sem.{holder.stdout.readline().strip().removeprefix('/')}"
    assert segment.exists() and semaphore.exists()
    for process in psutil.Process(holder.pid).children():
        process.kill()  # Python's tracker, which would remove the semaphore
    footprint.clear()
    holder.stdout.close()
    assert [path for path in (footprint.folder, board, segment, semaphore) if path.exists()] == []
    assert foreign.exists()
    other.clear()
    assert not foreign.exists()


def test_what_a_killed_owner_left_is_removed_at_the_next_start() -> None:
    """Files and processes of a cluster whose owner is gone go, and those of a living one stay."""
    code = (
        "import os, subprocess; from cluster.footprint import *; "
        "f = Footprint(); (SHM / f'ellm-{f.cluster_id}-cpu.board').touch(); log = open(f.folder / 'log', 'w'); "
        "worker = subprocess.Popen(['sleep', '1000'], stdout=log, stderr=log); "
        "print(f.cluster_id, worker.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    dead, worker = done.stdout.split()
    alive = Footprint()
    assert running(int(worker))
    assert dead in remove_leftovers()
    assert list(SHM.glob(f"ellm-{dead}-*")) == []
    assert not running(int(worker))
    assert alive.folder.exists()
    alive.clear()
