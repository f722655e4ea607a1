"""Couriers of two nodes: what has crossed is found by an engine there as on its own node, and is whole or not there."""

import asyncio
import contextlib
import itertools
import os
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import memory_agent.courier
from memory_agent.courier import Courier, CourierError
from memory_agent.host_segment import HostSegment, SegmentError
from memory_agent.mirror import Staged
from memory_agent.staging import StagingError, segment_path, staging_origin

PARTS, PART_BYTES = 3, 520
BLOCK_BYTES = PARTS * PART_BYTES
PLACES = 8
MOVE = "0" * 32
FINGERPRINT = b"f" * 32

Alter = Callable[[Staged], Awaitable[Staged]]


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def content(number: int) -> list[np.ndarray]:
    """As an engine divides a block: rows of an array with gaps."""
    rows = np.random.default_rng(number).integers(0, 256, (PARTS, 2, PART_BYTES), np.uint8)
    return [rows[:, 0]]


class Nodes:
    """The source's courier, and the destination's, which asks it. Folders are the nodes.

    Attributes:
        alter: what happens to an answer on its way.
        asked: how often the source was asked, and of which rank.
    """

    def __init__(self, folder: Path, bytes_s: int | None = None, ranks: int = 1) -> None:
        self.boards = folder / "source" / "x.board", folder / "destination" / "x.board"
        for board in self.boards:
            board.parent.mkdir(parents=True)
        self.origin = staging_origin(self.boards[0], 3)
        self.segments = [self.make(rank) for rank in range(ranks)]
        self.source = Courier(self.boards[0], self._nobody)
        self.destination = Courier(self.boards[1], self._ask, bytes_s)
        self.asked: list[int] = []
        self.alter: Alter | None = None

    def make(self, rank: int = 0, fingerprint: bytes = FINGERPRINT) -> HostSegment:
        return HostSegment.create(segment_path(self.origin, rank), BLOCK_BYTES, PLACES, fingerprint)

    async def fetch(self, move: str = MOVE, until: bytes = b"", within_s: float = 5.0) -> str:
        return await self.destination.fetch("source", str(self.origin), move, until, within_s)

    def there(self, rank: int = 0) -> dict[bytes, int]:
        """What an engine at the destination finds; every block of it is checked, as that engine would."""
        path = segment_path(self.boards[1].with_name(f"x-mirror-{MOVE}"), rank)
        try:
            segment = HostSegment.open(path)
        except SegmentError:
            return {}
        with contextlib.closing(segment):
            assert segment.fingerprint == FINGERPRINT
            found = segment.scan()
            for one, place in found.items():
                room = [np.zeros((PARTS, PART_BYTES), np.uint8)]
                if segment.read_into(place, one, room):
                    assert (room[0] == content(int.from_bytes(one, "big"))[0]).all()
                else:
                    assert segment.scan().get(one) != place, "it was there, but not whole"
            return found

    def close(self) -> None:
        for end in (self.source, self.destination):
            end.close()
        for segment in self.segments:
            segment.close()

    async def _ask(self, source: str, origin: str, rank: int, known: list[bytes], wait_s: float) -> Staged:
        assert source == "source"
        self.asked.append(rank)
        came = await self.source.staged(origin, rank, known, wait_s)
        return await self.alter(came) if self.alter is not None else came

    async def _nobody(self, *_: object) -> Staged:
        raise AssertionError("the source asks nobody")


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path)
    yield nodes
    nodes.close()


async def test_blocks_are_found_at_the_places_that_they_had(nodes: Nodes) -> None:
    for place, number in ((0, 10), (5, 11)):
        nodes.segments[0].write(place, key(number), content(number))
    assert Path(await nodes.fetch()).parent == nodes.boards[1].parent
    assert nodes.there() == {key(10): 0, key(11): 5}


async def test_only_what_is_new_comes_again_and_a_place_s_next_block_replaces_the_last(nodes: Nodes) -> None:
    segment, came = nodes.segments[0], []

    async def note(staged: Staged) -> Staged:
        came.extend(block.stored.key for block in staged.blocks)
        return staged

    nodes.alter = note
    segment.write(0, key(1), content(1))
    segment.write(1, key(2), content(2))
    await nodes.fetch()
    segment.release([0])
    segment.write(0, key(3), content(3))
    await nodes.fetch()
    assert came == [key(1), key(2), key(3)]
    assert nodes.there() == {key(3): 0, key(2): 1}


async def test_a_chunk_is_bounded(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_agent.courier, "CHUNK_BYTES", 3 * BLOCK_BYTES)
    for place in range(PLACES):
        nodes.segments[0].write(place, key(place), content(place))
    sizes = []

    async def note(staged: Staged) -> Staged:
        sizes.append(len(staged.blocks))
        return staged

    nodes.alter = note
    await nodes.fetch()
    assert sizes == [3, 3, 2, 0]
    assert len(nodes.there()) == PLACES


async def test_every_rank_s_blocks_come(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path, ranks=3)
    for rank, segment in enumerate(nodes.segments):
        segment.write(rank, key(1), content(1))
    await nodes.fetch()
    assert [nodes.there(rank) for rank in range(3)] == [{key(1): rank} for rank in range(3)]
    nodes.close()


async def test_a_block_that_is_still_to_come_is_waited_for(nodes: Nodes) -> None:
    nodes.segments[0].write(0, key(1), content(1))
    fetching = asyncio.create_task(nodes.fetch(until=key(2)))
    async with asyncio.timeout(5):
        while len(nodes.there()) < 1:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert not fetching.done()
    nodes.segments[0].write(4, key(2), content(2))
    await asyncio.wait_for(fetching, 5)
    assert nodes.there() == {key(1): 0, key(2): 4}


async def test_a_segment_that_is_still_to_come_is_waited_for(nodes: Nodes) -> None:
    nodes.segments.pop().close()
    segment_path(nodes.origin, 0).unlink()
    fetching = asyncio.create_task(nodes.fetch(until=key(2)))
    await asyncio.sleep(0.05)
    nodes.segments.append(nodes.make())
    nodes.segments[0].write(0, key(2), content(2))
    await asyncio.wait_for(fetching, 5)
    assert nodes.there() == {key(2): 0}


async def test_what_never_comes_is_given_up(nodes: Nodes) -> None:
    nodes.segments[0].write(0, key(1), content(1))
    with pytest.raises(CourierError, match=r"within 0\.1 s"):
        await nodes.fetch(until=key(2), within_s=0.1)
    assert nodes.there() == {key(1): 0}


async def test_an_engine_that_comes_into_the_row_is_not_mixed_with_the_one_before(nodes: Nodes) -> None:
    nodes.segments[0].write(0, key(1), content(1))
    await nodes.fetch()
    segment_path(nodes.origin, 0).unlink()
    nodes.segments.append(nodes.make(fingerprint=b"g" * 32))
    nodes.segments[1].write(1, key(2), content(2))
    origin = await nodes.fetch()
    with contextlib.closing(HostSegment.open(segment_path(Path(origin), 0))) as mirror:
        assert (mirror.fingerprint, set(mirror.scan())) == (b"g" * 32, {key(2)})


async def test_nothing_but_staging_memory_is_read(nodes: Nodes) -> None:
    other = nodes.origin.with_name("x-host0")
    HostSegment.create(segment_path(other, 0), BLOCK_BYTES, PLACES, FINGERPRINT).close()
    for origin in (str(other), str(nodes.boards[0]), "/etc", f"{nodes.origin.parent}/./{nodes.origin.name}"):
        with pytest.raises(StagingError):
            await nodes.source.staged(origin, 0, [])
    with pytest.raises(StagingError):
        await nodes.fetch(move="../../etc/passwd")


async def test_a_bound_on_bytes_a_second_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By waiting between chunks, for as long as the bucket says."""
    nodes, waits = Nodes(tmp_path, bytes_s=BLOCK_BYTES), []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await real(0)

    real = asyncio.sleep
    monkeypatch.setattr(memory_agent.courier.asyncio, "sleep", sleep)
    monkeypatch.setattr(memory_agent.courier, "CHUNK_BYTES", BLOCK_BYTES)
    for place in range(4):
        nodes.segments[0].write(place, key(place), content(place))
    await nodes.fetch()
    assert len(nodes.there()) == 4
    assert max(waits) > 2.5
    nodes.close()


async def test_mirrors_end_with_their_migration_when_idle_and_with_their_agent(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_agent.courier, "_PERIOD_S", 0.01)
    nodes.segments[0].write(0, key(1), content(1))

    def files() -> list[str]:
        return os.listdir(nodes.boards[1].parent)

    await nodes.fetch()
    assert len(files()) == 1
    await nodes.destination.forget(MOVE)
    await nodes.destination.forget(MOVE)
    assert not files()

    await nodes.fetch()
    expiring = asyncio.create_task(nodes.destination.run())
    await asyncio.sleep(0.05)
    assert len(files()) == 1
    monkeypatch.setattr(memory_agent.courier, "MIRROR_IDLE_S", 0.0)
    async with asyncio.timeout(5):
        while files():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    expiring.cancel()

    await nodes.fetch()
    nodes.destination.close()
    assert not files()

    (nodes.boards[1].with_name(f"x-mirror-{MOVE}-0")).touch()  # of an agent that was killed
    nodes.destination = Courier(nodes.boards[1], nodes._ask)
    assert not files()


async def test_there_are_only_so_many_mirrors(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_agent.courier, "MIRRORS_MOST", 2)
    for number in range(2):
        await nodes.fetch(move=UUID(int=number).hex)
    with pytest.raises(CourierError, match="2 requests"):
        await nodes.fetch(move=UUID(int=2).hex)
    await nodes.destination.forget(UUID(int=0).hex)
    await nodes.fetch(move=UUID(int=2).hex)


async def test_a_fetch_that_is_cancelled_or_whose_mirror_goes_writes_nothing_any_more(nodes: Nodes) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def hold(staged: Staged) -> Staged:
        begun.set()
        await go_on.wait()
        return staged

    nodes.alter = hold
    nodes.segments[0].write(0, key(1), content(1))
    cancelled = asyncio.create_task(nodes.fetch())
    await begun.wait()
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    begun.clear()
    forgotten = asyncio.create_task(nodes.fetch())
    await begun.wait()
    await nodes.destination.forget(MOVE)
    go_on.set()
    with pytest.raises(SegmentError):
        await forgotten
    assert nodes.there() == {}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), chunk_blocks=st.integers(1, PLACES), troubles=st.integers(0, 12))
def test_whatever_is_lost_a_block_is_whole_or_not_there(seed: int, chunk_blocks: int, troubles: int) -> None:
    """Answers get lost, cut and damaged, the source writes and empties places meanwhile, fetches are given up, the
    destination's agent is killed. ``there`` checks all content. Once it is quiet, all is there."""
    rng, numbers = random.Random(seed), itertools.count()

    async def run(nodes: Nodes) -> None:
        left = troubles

        def write() -> None:
            number, place = next(numbers), rng.randrange(PLACES)  # a block is staged once in a migration
            nodes.segments[0].write(place, key(number), content(number))

        async def alter(staged: Staged) -> Staged:
            nonlocal left
            if rng.random() < 0.5:
                write()
            if left == 0 or not staged.blocks:
                return staged
            left -= 1
            match rng.choice(["lost", "cut", "damaged", "mixed", "released", "killed"]):
                case "lost":
                    raise ConnectionError
                case "cut":
                    return replace(staged, payload=staged.payload[: rng.randrange(len(staged.payload)) // 8 * 8])
                case "damaged":
                    payload = staged.payload.copy()
                    payload[rng.randrange(len(payload))] ^= 1 << rng.randrange(8)
                    return replace(staged, payload=payload)
                case "mixed":
                    return replace(staged, payload=np.roll(staged.payload, rng.choice([1, BLOCK_BYTES])))
                case "released":
                    nodes.segments[0].release([rng.randrange(PLACES)])
                case "killed":
                    nodes.destination.close()
                    nodes.destination = Courier(nodes.boards[1], nodes._ask)
            return staged

        nodes.alter = alter
        for _ in range(6):
            write()
            with contextlib.suppress(ConnectionError, CourierError, SegmentError):
                await nodes.fetch(within_s=2.0)
            nodes.there()
        nodes.alter = None
        await nodes.fetch()
        assert nodes.segments[0].scan().items() <= nodes.there().items()

    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_agent.courier, "CHUNK_BYTES", chunk_blocks * BLOCK_BYTES)
        nodes = Nodes(Path(folder))
        try:
            asyncio.run(run(nodes))
        finally:
            nodes.close()
