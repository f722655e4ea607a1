"""A local memory agent, and engines without a model that share its device. No Ray."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from memory_agent.lease_board import LeaseBoard, Row, RowState
from memory_agent.tenant import EngineTerms
from replicas.local_agent import LocalAgent

FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")
DEATH_S = 2.0
"""A crashed engine's bytes are back within this."""


class KeptDevice(LocalAgent):
    """The agent and the fake engines' processes."""

    def __init__(self, path: Path, budget_bytes: int, weights_bytes: int = 0) -> None:
        super().__init__(path, budget_bytes, weights_bytes)
        self._fakes: dict[str, subprocess.Popen[str]] = {}

    def start_fake(self, engine_id: str, guarantee_bytes: int) -> tuple[Row, subprocess.Popen[str]]:
        """An engine that follows its lease with real memory and has no model; its row, when it is live."""
        budget = self.board.budget_bytes
        place = self.register(EngineTerms(engine_id, "fake", guarantee_bytes, budget, 0, os.getpid()))
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

    @property
    def dead_engines(self) -> int:
        return self.board.dead_engines

    def close(self) -> None:
        for process in self._fakes.values():
            process.kill()
            process.communicate()
        super().close()


@contextmanager
def kept_device(path: Path, budget_bytes: int, weights_bytes: int = 0) -> Iterator[KeptDevice]:
    device = KeptDevice(path, budget_bytes, weights_bytes)
    device.start()
    try:
        yield device
    finally:
        device.close()


def eventually(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Wait until ``condition`` holds. Raises AssertionError where it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"did not happen within {timeout_s:g} s"
        time.sleep(0.005)
