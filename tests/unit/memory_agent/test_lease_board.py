"""The lease board: words, leases and the file's life."""

import os
import struct
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_agent.errors import BoardError
from memory_agent.lease_board import (
    LIMIT_UNIT_BYTES,
    MAX_NAME_BYTES,
    MAX_ROWS,
    MAX_WORKERS,
    WORDS_OF_A_ROW,
    AgentWord,
    EngineWord,
    Lease,
    LeaseBoard,
    ReplicaWord,
    RowState,
)

BUDGET = 1 << 30


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "device.board"


@given(units=st.integers(0, 2**32 - 1), revision=st.integers(0, 2**32 - 1))
def test_lease_survives_its_word(units: int, revision: int) -> None:
    """A limit in whole units and its revision come back from one 64-bit word unchanged."""
    lease = Lease(units * LIMIT_UNIT_BYTES, revision)
    assert lease.pack() < 2**64
    assert Lease.unpack(lease.pack()) == lease


def test_revision_wraps_without_touching_the_limit() -> None:
    """The revision after the last one is 0, and the limit beside it stays."""
    assert Lease.unpack(Lease(7 * LIMIT_UNIT_BYTES, 2**32).pack()) == Lease(7 * LIMIT_UNIT_BYTES, 0)


def test_no_two_words_share_a_place() -> None:
    """Every word of every writer, those of the last worker included, has its own place inside the row."""
    ranges = {AgentWord.WORKER_START_0, EngineWord.WORKER_PID_0, EngineWord.WORKER_FD_0}
    places: list[int] = []
    for word in chain(AgentWord, ReplicaWord, EngineWord):
        places += range(word, word + (MAX_WORKERS if word in ranges else 1))
    assert len(places) == len(set(places))
    assert max(places) < WORDS_OF_A_ROW


def test_two_mappings_see_each_other(path: Path) -> None:
    """What one mapping stores, another mapping of the same file loads: words, lease and texts."""
    ours, theirs = LeaseBoard.create(path, BUDGET), LeaseBoard.open(str(path))
    row = ours.row(3)
    row.name("engine-é", "model")
    row.set(AgentWord.LEASE, Lease(5 * LIMIT_UNIT_BYTES, 9).pack())
    row.set(AgentWord.STATE, RowState.STARTING)
    seen = next(theirs.rows())
    assert (seen.index, seen.engine_id, seen.model, seen.state) == (3, "engine-é", "model", RowState.STARTING)
    assert seen.lease == Lease(5 * LIMIT_UNIT_BYTES, 9)
    theirs.row(3).set(EngineWord.COMMITTED_BYTES, 2**64 - 1)
    assert row.get(EngineWord.COMMITTED_BYTES) == 2**64 - 1


def test_rows_do_not_overlap(path: Path) -> None:
    """Filling every word and text of one row changes none of its neighbours."""
    board = LeaseBoard.create(path, BUDGET)
    row = board.row(1)
    row.name("x" * 500, "y" * 500)
    for word in range(WORDS_OF_A_ROW):
        row.set(word, 2**64 - 1)
    for other in (board.row(0), board.row(2)):
        assert (other.engine_id, other.model) == ("", "")
        assert all(other.get(word) == 0 for word in range(WORDS_OF_A_ROW))
    assert (row.engine_id, row.model) == ("x" * MAX_NAME_BYTES, "y" * MAX_NAME_BYTES)
    assert board.budget_bytes == BUDGET


def test_cleared_row_is_free_and_empty(path: Path) -> None:
    """A cleared row is FREE, listed no more, and keeps no word or text."""
    board = LeaseBoard.create(path, BUDGET)
    row = board.row(0)
    row.name("a", "b")
    row.set(EngineWord.PID, 1)
    row.set(AgentWord.STATE, RowState.LIVE)
    row.clear()
    assert list(board.rows()) == []
    assert (row.engine_id, row.get(EngineWord.PID)) == ("", 0)


def test_existing_board_is_opened_as_it_is(path: Path) -> None:
    """Creating over an existing board keeps its budget and counts: a restarted agent goes on from them."""
    board = LeaseBoard.create(path, BUDGET)
    board.budget_bytes, board.dead_engines = 42, 7
    board.close()
    again = LeaseBoard.create(path, BUDGET)
    assert (again.budget_bytes, again.dead_engines) == (42, 7)


@pytest.mark.parametrize("size", [0, 4096 + MAX_ROWS * 2048])
def test_half_made_board_is_finished(path: Path, size: int) -> None:
    """A board whose creator died before it wrote the header is made usable by the next create, not by open."""
    path.touch()
    os.truncate(path, size)
    with pytest.raises(BoardError):
        LeaseBoard.open(path)
    assert LeaseBoard.create(path, BUDGET).budget_bytes == BUDGET
    assert LeaseBoard.open(path).budget_bytes == BUDGET


def test_board_is_private(path: Path) -> None:
    """The file can be read and written by its owner alone."""
    LeaseBoard.create(path, BUDGET)
    assert path.stat().st_mode & 0o777 == 0o600


def test_missing_board_is_an_error_with_its_remedy(path: Path) -> None:
    """Opening a board that is not there names the path and asks for the agent."""
    with pytest.raises(BoardError, match=r"device\.board.*agent running"):
        LeaseBoard.open(path)


def test_foreign_files_are_refused(path: Path) -> None:
    """A file of another size, or of another version, is refused by open and by create, and not changed."""
    path.write_bytes(b"x" * 100)
    for opener in (LeaseBoard.open, lambda where: LeaseBoard.create(where, BUDGET)):
        with pytest.raises(BoardError, match="size differs"):
            opener(path)
    assert path.read_bytes() == b"x" * 100
    path.unlink()
    LeaseBoard.create(path, BUDGET).close()
    with path.open("r+b") as file:
        file.seek(8)
        file.write(struct.pack("Q", 99))
    for opener in (LeaseBoard.open, lambda where: LeaseBoard.create(where, BUDGET)):
        with pytest.raises(BoardError, match="found version 99"):
            opener(path)


def test_row_outside_the_board_is_refused(path: Path) -> None:
    """A row index outside the board raises instead of touching memory beyond it."""
    board = LeaseBoard.create(path, BUDGET)
    for index in (-1, MAX_ROWS):
        with pytest.raises(BoardError, match="0 to 31"):
            board.row(index)
