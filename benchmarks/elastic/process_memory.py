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
    """The most that an engine's workers held at once since this was made: weights, KV memory and activations."""

    def __init__(self, engine: LocalEngine) -> None:
        self._pids = [child.pid for child in engine.core_process().children()]
        for pid in self._pids:
            Path(f"/proc/{pid}/clear_refs").write_text(_RESET_PEAK)
        self.before_bytes = self._sum("VmRSS")
        """Held when this was made."""

    def read(self) -> int:
        return self._sum("VmHWM")

    def _sum(self, name: str) -> int:
        return sum(_memory(pid)[name] for pid in self._pids)


def _memory(pid: int) -> dict[str, int]:
    status = Path(f"/proc/{pid}/status").read_text()
    return {name: int(kib) * 1024 for name, kib in _FIELDS.findall(status)}
