"""A replica's tie to its row: an engine is not started before its lease holds its start."""

import logging
import threading
import time
from pathlib import Path

import pytest

from memory_agent.lease_board import LIMIT_UNIT_BYTES, AgentWord, Lease, LeaseBoard, Row
from replicas import board_link
from replicas.board_link import wait_for_lease


@pytest.fixture
def row(tmp_path: Path) -> Row:
    row = LeaseBoard.create(tmp_path / "board", 100 * LIMIT_UNIT_BYTES).row(0)
    row.name("starting", "model")
    return row


def issue(row: Row, units: int) -> None:
    row.set(AgentWord.LEASE, Lease(units * LIMIT_UNIT_BYTES, row.lease.revision + 1).pack())


def test_an_engine_waits_for_the_lease_of_its_start(row: Row) -> None:
    """A lease below what it takes holds the start up, also one that grows bit by bit; one that reaches it does not."""
    issue(row, 1)
    waiting = threading.Thread(target=wait_for_lease, args=(row, 3 * LIMIT_UNIT_BYTES))
    waiting.start()
    issue(row, 2)
    waiting.join(4 * board_link.LEASE_POLL_S)
    assert waiting.is_alive()
    issue(row, 3)
    waiting.join(10.0)
    assert not waiting.is_alive()


def test_a_lease_that_is_there_costs_no_wait(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual start."""
    issue(row, 3)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("slept"))
    wait_for_lease(row, 3 * LIMIT_UNIT_BYTES)


def test_a_wait_is_told(row: Row, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Who waits, for how much, and for whom, at once and again; and that it is over."""
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            issue(row, 3)

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(board_link, "SAY_AGAIN_S", 0.0)
    with caplog.at_level(logging.WARNING, logger="ray.serve"):
        logging.getLogger("ray.serve").addHandler(caplog.handler)
        wait_for_lease(row, 3 * LIMIT_UNIT_BYTES)
        logging.getLogger("ray.serve").removeHandler(caplog.handler)
    first, *again, end = [line for line in caplog.messages if "engine starting" in line]
    assert f"its lease is 0 bytes, its start takes {3 * LIMIT_UNIT_BYTES}" in first
    assert again
    assert "engine starting starts, after" in end
