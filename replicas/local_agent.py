"""A memory agent without Ray: a lease board that a thread of this process keeps. For tests and benchmarks."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memory_agent.agent import Registration
from memory_agent.device_report import sample_engine
from memory_agent.lease_board import LeaseBoard
from memory_agent.lease_keeper import LeaseKeeper
from memory_agent.reports import EngineReport
from memory_agent.tenant import EngineTerms

TICK_S = 0.05


class LocalAgent:
    """Gives engines their leases, every TICK_S seconds. Its board is ``board``."""

    def __init__(self, path: Path, budget_bytes: int, weights_bytes: int = 0) -> None:
        self._keeper = LeaseKeeper(path, budget_bytes, weights_bytes)
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep)
        self.most_held_bytes = 0
        """Of all engines together, by the operating system, at any tick."""

    @property
    def board(self) -> LeaseBoard:
        return self._keeper.board

    def register(self, terms: EngineTerms) -> Registration:
        """A row for an engine. Raises what LeaseKeeper raises where it can never fit."""
        with self._lock:
            return Registration(str(self.board.path), self._keeper.register(terms).index)

    def report(self, engine_id: str) -> EngineReport | None:
        """The engine now; None where it has no row."""
        with self._lock:
            tenants = [tenant for tenant in self._keeper.tenants if tenant.engine_id == engine_id]
            return sample_engine(tenants[0]) if tenants else None

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop. The board stays as a file."""
        self._done.set()
        self._thread.join()
        self._keeper.close()

    def _keep(self) -> None:
        while not self._done.wait(TICK_S):
            with self._lock:
                self._keeper.tick(time.monotonic())
                held = sum(sample_engine(tenant).held_bytes_os for tenant in self._keeper.tenants)
                self.most_held_bytes = max(self.most_held_bytes, held)


@contextmanager
def local_agent(path: Path, budget_bytes: int, weights_bytes: int = 0) -> Iterator[LocalAgent]:
    """One whose board is the new file ``path``, while the block runs. weights_bytes: set aside beside the budget."""
    agent = LocalAgent(path, budget_bytes, weights_bytes)
    agent.start()
    try:
        yield agent
    finally:
        agent.close()
