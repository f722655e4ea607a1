"""A lease board that this process keeps, as the memory agent would, and engines without a model beside it. No Ray."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from memory_agent.agent import Registration
from memory_agent.device_report import sample_engine
from memory_agent.lease_board import LeaseBoard, Row, RowState
from memory_agent.lease_keeper import LeaseKeeper
from memory_agent.reports import EngineReport
from memory_agent.tenant import EngineTerms

FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")
TICK_S = 0.05
DEATH_S = 2.0
"""A crashed engine's bytes are back within this."""


class KeptDevice:
    """The agent's logic on a thread, 20 times a second."""

    def __init__(self, path: Path, budget_bytes: int) -> None:
        self._keeper = LeaseKeeper(path, budget_bytes)
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep)
        self._fakes: dict[str, subprocess.Popen[str]] = {}
        self.most_held_bytes = 0
        """Of all engines together, by the operating system, at any tick."""

    def _keep(self) -> None:
        while not self._done.wait(TICK_S):
            with self._lock:
                self._keeper.tick(time.monotonic())
                held = sum(sample_engine(tenant).held_bytes_os for tenant in self._keeper.tenants)
                self.most_held_bytes = max(self.most_held_bytes, held)

    def register(self, terms: EngineTerms) -> Registration:
        with self._lock:
            return Registration(str(self._keeper.board.path), self._keeper.register(terms).index)

    def start_fake(self, engine_id: str, guarantee_bytes: int) -> tuple[Row, subprocess.Popen[str]]:
        """An engine that follows its lease with real memory and has no model; its row, when it is live."""
        budget = self._keeper.board.budget_bytes
        place = self.register(EngineTerms(engine_id, "fake", guarantee_bytes, budget, 1, os.getpid()))
        command = [sys.executable, str(FAKE_ENGINE), place.board_path, str(place.row)]
        self._fakes[engine_id] = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
        row = LeaseBoard.open(place.board_path).row(place.row)
        eventually(lambda: row.state is RowState.LIVE)
        return row, self._fakes[engine_id]

    def demand(self, engine_id: str, demand_bytes: int) -> None:
        stdin = self._fakes[engine_id].stdin
        assert stdin is not None
        stdin.write(f"demand {demand_bytes}\n")
        stdin.flush()

    def report(self, engine_id: str) -> EngineReport | None:
        """The engine now; None where it has no row."""
        with self._lock:
            tenants = [tenant for tenant in self._keeper.tenants if tenant.engine_id == engine_id]
            return sample_engine(tenants[0]) if tenants else None

    @property
    def dead_engines(self) -> int:
        return self._keeper.board.dead_engines

    def _start(self) -> None:
        self._thread.start()

    def _close(self) -> None:
        self._done.set()
        self._thread.join()
        for process in self._fakes.values():
            process.kill()
            process.communicate()
        self._keeper.close()


@contextmanager
def kept_device(path: Path, budget_bytes: int) -> Iterator[KeptDevice]:
    device = KeptDevice(path, budget_bytes)
    device._start()
    try:
        yield device
    finally:
        device._close()


def eventually(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Wait until ``condition`` holds. Raises AssertionError where it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"did not happen within {timeout_s:g} s"
        time.sleep(0.005)
