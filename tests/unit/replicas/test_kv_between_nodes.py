"""A running request moves between engines of two nodes, whose memory agents' couriers carry its KV: engines without a
model (see ``test_kv_migration``), real staging memory and mirrors, and no Ray."""

import asyncio
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from memory_agent.courier import Courier
from memory_agent.lease_board import LeaseBoard
from memory_agent.mirror import Staged
from memory_agent.staging import segment_path
from tests.unit.replicas.test_kv_migration import Pair, both_schedulers, leave_everywhere

MOVE = "ab" * 16


class PairOfNodes(Pair):
    """Each engine has a board in a folder of its own, and a courier beside it.

    Attributes:
        damages: the next answers of the source's courier, each as its bit says, come damaged.
    """

    def __init__(self, folder: Path, asynchronous: bool, ranks: int) -> None:
        super().__init__(folder, asynchronous, ranks)
        self.damages = 0
        self.there = Courier(self.destination_board, self._ask)
        self.here = Courier(folder / "board", self._ask)

    def other_board(self, board: LeaseBoard, budget_bytes: int) -> LeaseBoard:
        self.destination_board = board.path.parent / "elsewhere" / "board"
        self.destination_board.parent.mkdir()
        return LeaseBoard.create(self.destination_board, budget_bytes)

    def bring(self, origin: str, until: str = "") -> str:
        self.step()  # a worker copies the last blocks after the request has stopped
        return asyncio.run(self.there.fetch("source", origin, MOVE, bytes.fromhex(until)))

    async def _ask(self, source: str, origin: str, rank: int, known: list[bytes], wait_s: float) -> Staged:
        staged = await self.here.staged(origin, rank, known, wait_s)
        if staged.blocks and self.damages & 1:
            staged.payload[len(staged.payload) // 2] ^= 1
        self.damages >>= 1
        return staged

    def close(self) -> None:
        asyncio.run(self.there.forget(MOVE))
        assert not [name for name in os.listdir(self.destination_board.parent) if "mirror" in name]
        super().close()
        for courier in (self.here, self.there):
            courier.close()


@contextmanager
def pair(asynchronous: bool = False, ranks: int = 1) -> Iterator[PairOfNodes]:
    with tempfile.TemporaryDirectory() as folder:
        engines = PairOfNodes(Path(folder), asynchronous, ranks)
        try:
            yield engines
        finally:
            engines.close()


@pytest.mark.parametrize("ranks", [1, 2])
@both_schedulers
def test_a_request_moves_to_another_node_with_all_of_its_kv(asynchronous: bool, ranks: int) -> None:
    """The destination's first step computes its newest token and no other."""
    with pair(asynchronous, ranks) as two:
        two.ask(prompt=150, tokens=200)
        two.decode(30)
        assert two.rounds().error is None
        assert two.switch().error is None
        assert two.moved is not None and two.moved.last
        two.finish()
        assert two.destination.first_steps["r"] == 1


@both_schedulers
def test_every_place_in_a_block_is_a_good_place_to_leave(asynchronous: bool) -> None:
    """The key of the last block, which the fetch waits for, is that of the tail, or of the last full block."""
    leave_everywhere(lambda: pair(asynchronous))


def test_what_comes_damaged_is_asked_for_again() -> None:
    with pair() as two:
        two.damages = 0b10101
        two.ask(prompt=150, tokens=100)
        two.decode(30)
        two.rounds()
        assert two.switch().error is None
        two.finish()
        assert two.damages == 0
        assert two.destination.first_steps["r"] == 1


def test_a_mirror_that_is_gone_costs_computing_and_no_token() -> None:
    """The destination's agent has died between the fetch and the load."""
    with pair() as two:
        two.ask(prompt=150, tokens=100)
        two.decode(30)
        two.rounds()
        bring = two.bring

        def bring_in_vain(origin: str, until: str = "") -> str:
            there = bring(origin, until)
            segment_path(Path(there), 0).unlink()
            return there

        two.bring = bring_in_vain  # type: ignore[method-assign]
        assert two.switch().error is None
        two.finish()
        assert two.destination.first_steps["r"] > 1
