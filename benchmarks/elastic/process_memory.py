"""Memory of an engine's processes, by the operating system."""

import re
from pathlib import Path

import psutil

from benchmarks.overhead import engine_pids
from replicas.local_engine import LocalEngine

_FIELDS = re.compile(r"^(VmHWM|VmRSS):\s+(\d+) kB", re.MULTILINE)
_RESET_PEAK = "5"


def resident_bytes(engine: LocalEngine) -> int:
    """Resident bytes of the engine's process tree; pages that its processes share count once for each."""
    return sum(psutil.Process(pid).memory_info().rss for pid in engine_pids(engine))


class WorkerPeak:
    """The most that an engine's workers held since the last ``restart``, above what they held when this was made.

    KV memory counts: it is taken from that floor.
    """

    def __init__(self, engine: LocalEngine, kv_bytes: int) -> None:
        """``kv_bytes``: KV memory that is resident now. A static tensor is, all of it, from the start."""
        self._pids = [child.pid for child in engine.core_process().children()]
        self._floor = sum(_memory(pid)["VmRSS"] for pid in self._pids) - kv_bytes

    def restart(self) -> None:
        for pid in self._pids:
            Path(f"/proc/{pid}/clear_refs").write_text(_RESET_PEAK)

    def read(self) -> int:
        return sum(_memory(pid)["VmHWM"] for pid in self._pids) - self._floor


def _memory(pid: int) -> dict[str, int]:
    status = Path(f"/proc/{pid}/status").read_text()
    return {name: int(kib) * 1024 for name, kib in _FIELDS.findall(status)}
