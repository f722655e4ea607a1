"""The contract of a transport, held by the one through shared memory and by the fake of the other tests."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from replicas.kv_transport import SharedMemoryTransport, Transport, TransportError
from tests.unit.replicas.fake_transport import FakeTransport, Shared

BLOCK_BYTES, PLACES = 64, 3
KEYS = [bytes([n]) * 32 for n in range(5)]
MakeTransport = Callable[..., Transport]


@pytest.fixture(params=["shared memory", "fake"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> MakeTransport:
    """A transport by name."""
    shared: Shared = {}

    def build(name: str) -> Transport:
        if request.param == "fake":
            return FakeTransport(name, shared)
        return SharedMemoryTransport(tmp_path / name, BLOCK_BYTES, PLACES, 0, b"f" * 32)

    return build


def block(value: int) -> list[np.ndarray]:
    """Two layers of 32 bytes."""
    return [np.full((2, 32), value, np.uint8)]


def test_a_block_arrives_as_it_was_sent(make: MakeTransport) -> None:
    source, destination = make("a"), make("b")
    source.send(0, KEYS[0], block(1))
    source.send(2, KEYS[1], block(2))
    assert destination.arrived(source.origin) == {KEYS[0]: 0, KEYS[1]: 2}
    got = block(0)
    assert destination.receive(source.origin, 2, KEYS[1], got)
    assert (got[0] == 2).all()


def test_what_is_not_there_is_not_received(make: MakeTransport) -> None:
    source, destination = make("a"), make("b")
    assert destination.arrived(source.origin) == {}
    assert not destination.receive(source.origin, 0, KEYS[0], block(0))
    source.send(0, KEYS[0], block(1))
    assert not destination.receive(source.origin, 1, KEYS[0], block(0))
    assert not destination.receive(source.origin, 0, KEYS[1], block(0))


def test_what_was_withdrawn_or_replaced_is_not_received(make: MakeTransport) -> None:
    source, destination = make("a"), make("b")
    source.send(0, KEYS[0], block(1))
    source.send(1, KEYS[1], block(1))
    source.withdraw([0])
    source.send(1, KEYS[2], block(3))
    assert destination.arrived(source.origin) == {KEYS[2]: 1}
    assert not destination.receive(source.origin, 0, KEYS[0], block(0))
    assert not destination.receive(source.origin, 1, KEYS[1], block(0))


def test_nothing_arrives_from_an_end_that_is_gone(make: MakeTransport) -> None:
    source, destination = make("a"), make("b")
    source.send(0, KEYS[0], block(1))
    source.close()
    assert destination.arrived(source.origin) == {}
    assert not destination.receive(source.origin, 0, KEYS[0], block(0))
    source.close()


def test_kv_of_another_model_does_not_arrive(tmp_path: Path) -> None:
    source = SharedMemoryTransport(tmp_path / "a", BLOCK_BYTES, PLACES, 0, b"f" * 32)
    other = SharedMemoryTransport(tmp_path / "b", BLOCK_BYTES, PLACES, 0, b"g" * 32)
    source.send(0, KEYS[0], block(1))
    assert other.arrived(source.origin) == {}
    assert not other.receive(source.origin, 0, KEYS[0], block(0))


def test_each_rank_has_its_own_blocks(tmp_path: Path) -> None:
    source = SharedMemoryTransport(tmp_path / "a", BLOCK_BYTES, PLACES, 0, b"f" * 32)
    source.send(0, KEYS[0], block(1))
    assert SharedMemoryTransport(tmp_path / "b", BLOCK_BYTES, PLACES, 1, b"f" * 32).arrived(source.origin) == {}


def test_nothing_is_read_outside_of_our_folder(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    source = SharedMemoryTransport(tmp_path / "elsewhere" / "a", BLOCK_BYTES, PLACES, 0, b"f" * 32)
    source.send(0, KEYS[0], block(1))
    destination = SharedMemoryTransport(tmp_path / "b", BLOCK_BYTES, PLACES, 0, b"f" * 32)
    assert destination.arrived(source.origin) == {}


def test_a_damaged_block_is_not_received(tmp_path: Path) -> None:
    source = SharedMemoryTransport(tmp_path / "a", BLOCK_BYTES, PLACES, 0, b"f" * 32)
    destination = SharedMemoryTransport(tmp_path / "b", BLOCK_BYTES, PLACES, 0, b"f" * 32)
    source.send(0, KEYS[0], block(1))
    with (tmp_path / "a-0").open("r+b") as file:
        at = file.read().index(bytes([1]) * BLOCK_BYTES)
        file.seek(at)
        file.write(b"\7")
    assert not destination.receive(source.origin, 0, KEYS[0], block(0))


def test_no_memory_is_taken_before_a_block_is_sent_and_none_is_left(tmp_path: Path) -> None:
    source = SharedMemoryTransport(tmp_path / "a", BLOCK_BYTES, PLACES, 0, b"f" * 32)
    source.withdraw([0])
    assert list(tmp_path.iterdir()) == []
    source.send(0, KEYS[0], block(1))
    source.close()
    assert list(tmp_path.iterdir()) == []


def test_a_segment_that_cannot_be_made_is_a_transport_error(tmp_path: Path) -> None:
    source = SharedMemoryTransport(tmp_path / "missing" / "a", BLOCK_BYTES, PLACES, 0, b"f" * 32)
    with pytest.raises(TransportError):
        source.send(0, KEYS[0], block(1))
