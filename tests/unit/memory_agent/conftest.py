"""A lease board, its keeper, and processes on it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from memory_agent.lease_keeper import LeaseKeeper
from tests.unit.memory_agent.board_players import BUDGET, ROOM, Clock, Processes


@pytest.fixture
def processes() -> Iterator[Processes]:
    processes = Processes()
    yield processes
    processes.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "device.board"


@pytest.fixture
def keeper(path: Path) -> Iterator[LeaseKeeper]:
    keeper = LeaseKeeper(path, BUDGET, ROOM)
    yield keeper
    keeper.close()


@pytest.fixture
def clock(keeper: LeaseKeeper) -> Clock:
    return Clock(keeper)
