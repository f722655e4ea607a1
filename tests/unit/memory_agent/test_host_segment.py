"""The host segment: what was written is read, and nothing else ever is."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from memory_agent.errors import OutOfDeviceMemory, SettingsError
from memory_agent.host_segment import HostSegment, Part, SegmentError, Words
from memory_agent.vmm import ContractViolation

PIECES, PIECE_BYTES = 5, 6 * 1024 + 40
SLOT_BYTES, SLOTS = PIECES * PIECE_BYTES, 8
FINGERPRINT = bytes(range(32))
ROOT = Path(__file__).parents[3]
"""Where child processes find this module and ours."""
Block = list[NDArray[np.uint8]]


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def block(number: int) -> Block:
    """Content that follows from the number; its pieces are rows of an array with gaps, as in a KV cache."""
    rows = np.random.default_rng(number).integers(0, 256, (PIECES, 2, PIECE_BYTES), np.uint8)
    return [row[0] for row in rows]


def room() -> Block:
    return [np.zeros(PIECE_BYTES, np.uint8) for _ in range(PIECES)]


def same(one: Block, other: Block) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file in real shared memory, where bytes are counted at once."""
    path = Path("/dev/shm") / f"ellm-test-{os.getpid()}-{tmp_path_factory.mktemp('segment').name}"
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def segment(path: Path) -> Iterator[HostSegment]:
    segment = HostSegment.create(path, SLOT_BYTES, SLOTS, FINGERPRINT)
    yield segment
    segment.close()


def test_a_block_is_read_as_it_was_written_by_another_mapping(segment: HostSegment, path: Path) -> None:
    """A reader finds geometry and fingerprint in the file and copies a block out of every slot, byte for byte."""
    reader = HostSegment.open(path)
    assert (reader.slot_bytes, reader.slots, reader.fingerprint) == (SLOT_BYTES, SLOTS, FINGERPRINT)
    for slot in range(SLOTS):
        segment.write(slot, key(slot), block(slot))
    for slot in range(SLOTS):
        into = room()
        assert reader.read_into(slot, key(slot), into)
        assert same(into, block(slot))
    reader.close()


def test_what_is_not_the_block_is_refused(segment: HostSegment) -> None:
    """An empty slot, another key, another division or length, and a slot that does not exist are all False."""
    segment.write(0, key(1), block(1))
    one_piece: list[Part] = [np.zeros(SLOT_BYTES, np.uint8)]
    assert not segment.read_into(1, key(1), room())
    assert not segment.read_into(1, bytes(32), room())
    assert not segment.read_into(0, key(2), room())
    assert not segment.read_into(0, key(1), one_piece)
    assert not segment.read_into(0, key(1), room()[1:])
    assert not segment.read_into(0, b"short", room())
    assert not segment.read_into(SLOTS, key(1), room())
    assert not segment.read_into(-1, key(1), room())
    assert segment.read_into(0, key(1), room())


@pytest.mark.parametrize("as_rows", [False, True])
def test_pieces_in_another_order_are_refused(segment: HostSegment, path: Path, as_rows: bool) -> None:
    """Two layers that have changed places in the file do not pass for the block, whether parts or rows of a part."""
    segment.write(0, key(1), [np.array(block(1))] if as_rows else block(1))
    assert segment.read_into(0, key(1), [np.array(room())] if as_rows else room())
    with path.open("r+b") as file:
        start = path.stat().st_size - SLOTS * -(-SLOT_BYTES // 4096) * 4096
        file.seek(start)
        first, second = file.read(PIECE_BYTES), file.read(PIECE_BYTES)
        file.seek(start)
        file.write(second + first)
    assert not segment.read_into(0, key(1), [np.array(room())] if as_rows else room())


@settings(max_examples=60)
@given(bit=st.integers(0, SLOT_BYTES * 8 - 1))
def test_any_flipped_bit_is_found(bit: int) -> None:
    """Whichever bit of the payload turns over, the block is refused; turned back, it is read again."""
    path = Path(f"/dev/shm/ellm-test-{os.getpid()}-bit")
    segment = HostSegment.create(path, SLOT_BYTES, 1, FINGERPRINT)
    try:
        segment.write(0, key(1), block(1))
        at = path.stat().st_size - -(-SLOT_BYTES // 4096) * 4096 + bit // 8
        for expected in (False, True):
            with path.open("r+b") as file:
                file.seek(at)
                turned = file.read(1)[0] ^ (1 << bit % 8)
                file.seek(at)
                file.write(bytes([turned]))
            assert segment.read_into(0, key(1), room()) == expected
    finally:
        segment.close()
        path.unlink()


class SlowSegment(HostSegment):
    """Calls ``between`` when half of the pieces have been moved."""

    between: Callable[[], object] = staticmethod(lambda: None)

    def _transfer(self, call: Callable[..., int], parts: Sequence[Words], slot: int) -> int:
        def halves(fd: int, batch: list[Words], offset: int) -> int:
            moved = call(fd, batch[:2], offset)
            self.between()
            return moved + call(fd, batch[2:], offset + moved)

        return super()._transfer(halves, parts, slot)


@pytest.mark.parametrize("change", ["same key", "other key", "release", "release and write"])
def test_a_slot_that_changes_during_the_copy_is_refused(segment: HostSegment, path: Path, change: str) -> None:
    """A slot rewritten or released while a reader is half-way is False, even with the same key and content."""
    reader = SlowSegment.open(path)
    segment.write(3, key(1), block(1))

    def interfere() -> None:
        if change.startswith("release"):
            segment.release([3])
        if change != "release":
            number = 2 if change == "other key" else 1
            segment.write(3, key(number), block(number))

    reader.between = interfere
    assert not reader.read_into(3, key(1), room())
    reader.close()


def test_a_copy_torn_behind_the_generations_back_is_refused(segment: HostSegment, path: Path) -> None:
    """Where the words arrive out of turn (weak memory order), the checksum alone finds the mixture of two blocks."""
    reader = SlowSegment.open(path)
    segment.write(3, key(1), block(1))
    offset = path.stat().st_size - (SLOTS - 3) * -(-SLOT_BYTES // 4096) * 4096

    def overwrite() -> None:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(b"".join(piece.tobytes() for piece in block(2)))

    reader.between = overwrite
    assert not reader.read_into(3, key(1), room())
    reader.close()


def test_an_interrupted_write_leaves_nothing_to_read(path: Path) -> None:
    """A slot whose writer was interrupted is not read, even where its bytes happen to be whole, until it is written."""
    segment = SlowSegment.create(path, SLOT_BYTES, SLOTS, FINGERPRINT)
    segment.write(0, key(1), block(1))

    def interrupt() -> None:
        raise KeyboardInterrupt

    segment.between = interrupt
    with pytest.raises(KeyboardInterrupt):
        segment.write(0, key(1), block(1))
    del segment.between
    assert not segment.read_into(0, key(1), room())
    assert segment.scan() == {}
    segment.write(0, key(1), block(1))
    assert segment.read_into(0, key(1), room())
    segment.close()


def test_readers_beside_a_busy_writer_see_whole_blocks_only(segment: HostSegment, path: Path) -> None:
    """While another process rewrites a slot over and over, each successful read is exactly one of its blocks."""
    code = (
        "import sys, time; from pathlib import Path; from memory_agent.host_segment import HostSegment\n"
        "from tests.unit.memory_agent.test_host_segment import block, key\n"
        "segment = HostSegment.adopt(Path(sys.argv[1])); blocks = [block(n) for n in range(2)]\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    for n in range(2): segment.write(0, key(n), blocks[n]); time.sleep(1e-4)\n"
    )
    segment.close()
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert writer.stdout and writer.stdout.readline() == b"ready\n"
        reader, whole, refused = HostSegment.open(path), 0, 0
        while (whole < 200 or refused < 200) and whole + refused < 1_000_000:
            into, number = room(), (whole + refused) % 2
            if reader.read_into(0, key(number), into):
                assert same(into, block(number))
                whole += 1
            else:
                refused += 1
        assert min(whole, refused) >= 200
    finally:
        writer.kill()
        writer.communicate()


def test_memory_is_committed_by_writes_and_given_back_by_releases(segment: HostSegment) -> None:
    """An empty segment takes its headers; a slot takes its pages when written, and none when released."""
    empty, slot_pages = segment.held_bytes(), -(-SLOT_BYTES // 4096) * 4096
    assert empty == 2 * 4096
    for slot in range(3):
        segment.write(slot, key(slot), block(slot))
    segment.write(0, key(9), block(9))
    assert segment.held_bytes() == empty + 3 * slot_pages
    segment.release([0, 2, 7])
    assert segment.held_bytes() == empty + slot_pages
    assert not segment.read_into(0, key(9), room())
    assert segment.held_bytes() == empty + slot_pages
    assert segment.read_into(1, key(1), room())


def test_a_full_file_system_is_an_error_that_costs_one_slot_only(tmp_path: Path) -> None:
    """In a tmpfs of 256 KiB a write beyond it is OutOfDeviceMemory; the slot is empty, others stay, and after a release
    it works."""
    code = (
        "import sys; from pathlib import Path; import memory_agent.host_segment as h; import numpy as np\n"
        "from memory_agent.errors import OutOfDeviceMemory\n"
        "h._check_room = lambda *a: None\n"
        "s = h.HostSegment.create(Path(sys.argv[1]) / 's', 100 * 1024, 4, bytes(32))\n"
        "block, into = np.full((2, 50 * 1024), 7, np.uint8), np.zeros((2, 50 * 1024), np.uint8)\n"
        "for n in range(2): s.write(n, bytes([n]) * 32, [block])\n"
        "held = s.held_bytes()\n"
        "try: s.write(2, b'c' * 32, [block])\n"
        "except OutOfDeviceMemory as e: print(e)\n"
        "assert s.held_bytes() == held and len(s.scan()) == 2 and s.read_into(1, bytes([1]) * 32, [into])\n"
        "s.release([0]); s.write(2, b'c' * 32, [block]); assert s.read_into(2, b'c' * 32, [into]); print('done')\n"
    )
    mount = 'mount -t tmpfs -o size=256k none "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "-Urm", "sh", "-c", mount, "sh", str(tmp_path), sys.executable, code]
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets no user mount a small file system")
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert "make the host buffer smaller" in ran.stdout and ran.stdout.endswith("done\n")


class FullSegment(HostSegment):
    """A file system that takes only half of what is written."""

    def _transfer(self, call: Callable[..., int], parts: Sequence[Words], slot: int) -> int:
        return super()._transfer(call, parts[: len(parts) // 2], slot)


def test_a_write_cut_short_leaves_the_slot_empty(path: Path) -> None:
    """When the memory ends in the middle of a block, the slot, full before, is empty and holds no byte."""
    segment = FullSegment.create(path, SLOT_BYTES, SLOTS, FINGERPRINT)
    empty = segment.held_bytes()
    with pytest.raises(OutOfDeviceMemory, match="make the host buffer smaller"):
        segment.write(0, key(1), block(1))
    assert segment.held_bytes() == empty
    assert segment.scan() == {}
    segment.close()


def test_a_size_that_cannot_be_filled_is_refused_with_what_fits(path: Path) -> None:
    """More slots than memory is a SettingsError with a number of slots that is accepted, and leaves no file."""
    with pytest.raises(SettingsError, match=r"at most [0-9]+ slots fit") as caught:
        HostSegment.create(path, 1 << 20, 1 << 30, FINGERPRINT)
    assert not path.exists()
    fit = int(str(caught.value).split("at most ")[1].split()[0])
    assert fit > 0
    HostSegment.create(path, 1 << 20, fit * 9 // 10, FINGERPRINT).close()


@pytest.mark.parametrize(("slot_bytes", "slots", "fingerprint"), [(0, 1, 32), (1, 0, 32), (1, 1, 31), (-1, 1, 32)])
def test_impossible_settings_are_refused(path: Path, slot_bytes: int, slots: int, fingerprint: int) -> None:
    """Slots without bytes, no slots, and a fingerprint of another length are settings errors."""
    with pytest.raises(SettingsError, match="at least one slot"):
        HostSegment.create(path, slot_bytes, slots, bytes(fingerprint))


def test_the_file_is_private_and_never_replaced(segment: HostSegment, path: Path) -> None:
    """The owner alone may read it, and creating it again says what to do instead."""
    assert path.stat().st_mode & 0o777 == 0o600
    segment.write(0, key(1), block(1))
    with pytest.raises(SegmentError, match="adopt it, or remove it"):
        HostSegment.create(path, SLOT_BYTES, SLOTS, FINGERPRINT)
    assert segment.read_into(0, key(1), room())


def test_foreign_files_are_refused(path: Path) -> None:
    """A missing file, an unfinished one, another version and another length are each refused by open and by adopt."""
    for opener in (HostSegment.open, HostSegment.adopt):
        with pytest.raises(SegmentError, match="has its engine started"):
            opener(path)
    HostSegment.create(path, SLOT_BYTES, SLOTS, FINGERPRINT).close()
    whole = path.read_bytes()
    for content in (b"", bytes(len(whole)), whole[:8] + b"\x63" + whole[9:], whole[:-1]):
        path.write_bytes(content)
        for opener in (HostSegment.open, HostSegment.adopt):
            with pytest.raises(SegmentError, match="remove it"):
                opener(path)


def test_readers_write_nothing(segment: HostSegment, path: Path) -> None:
    """A reader that would write or release is stopped, and so is a write that no slot could hold."""
    reader = HostSegment.open(path)
    bad: list[Callable[[], Any]] = [
        lambda: reader.write(0, key(1), block(1)),
        lambda: reader.release([0]),
        lambda: segment.write(SLOTS, key(1), block(1)),
        lambda: segment.release([-1]),
        lambda: segment.write(0, b"short", block(1)),
        lambda: segment.write(0, key(1), []),
        lambda: segment.write(0, key(1), [*block(1), np.zeros(8, np.uint8)]),
        lambda: segment.write(0, key(1), [np.zeros(7, np.uint8)]),
        lambda: segment.write(0, key(1), [np.zeros((8, 16), np.uint8)[:, ::2]]),
        lambda: segment.write(0, key(1), [np.zeros((2, 2, 8), np.uint8)]),
    ]
    for call in bad:
        with pytest.raises(ContractViolation):
            call()
    assert segment.scan() == {}
    reader.close()


def test_rows_of_one_array_are_pieces_too(segment: HostSegment) -> None:
    """A block of a layer-outermost KV cache, one array with gaps between its rows, is written and read in place: rows
    are pieces, and its neighbours keep their content."""
    cache = np.random.default_rng(0).integers(0, 256, (PIECES, 4, PIECE_BYTES), np.uint8)
    expected = cache.copy()
    expected[:, 3] = cache[:, 1]
    segment.write(0, key(1), [cache[:, 1]])
    assert segment.read_into(0, key(1), [cache[:, 3]])
    assert np.array_equal(cache, expected)
    assert not segment.read_into(0, key(1), [np.zeros(SLOT_BYTES, np.uint8)])
    segment.write(0, key(1), [cache[:2, 1], cache[2:, 1]])
    assert segment.read_into(0, key(1), [cache[:2, 2], cache[2:, 2]])
    assert np.array_equal(cache[:, 2], cache[:, 1])


def test_a_block_of_more_pieces_than_a_system_call_takes(path: Path) -> None:
    """Over 1,024 pieces are written and read like any others."""
    segment = HostSegment.create(path, 3000 * 8, 1, FINGERPRINT)
    content = np.random.default_rng(0).integers(0, 2**63, (3000, 1), np.uint64)
    into = np.zeros_like(content)
    segment.write(0, key(1), [content])
    assert segment.read_into(0, key(1), [into])
    assert np.array_equal(content, into)
    segment.close()


def test_another_process_adopts_what_is_whole_when_the_writer_was_killed(path: Path) -> None:
    """A writer killed in the middle of a write: while it lives nobody adopts it; then one does, finds every whole block
    and not the torn one, and may write, the torn slot included."""
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.unit.memory_agent.test_host_segment import *\n"
        "s = SlowSegment.create(Path(sys.argv[1]), SLOT_BYTES, SLOTS, FINGERPRINT)\n"
        "for n in range(4): s.write(n, key(n), block(n))\n"
        "s.release([1])\n"
        "s.between = lambda: (print('half', flush=True), sys.stdin.read())\n"
        "s.write(2, key(9), block(9))\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert writer.stdout and writer.stdout.readline() == b"half\n"
    reader = HostSegment.open(path)
    assert reader.writer_runs() and reader.writer_pid == writer.pid
    with pytest.raises(SegmentError, match=f"process {writer.pid} writes"):
        HostSegment.adopt(path)
    writer.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, writer.pid, os.WEXITED | os.WNOWAIT)
    assert not reader.writer_runs()  # a zombie has ended
    writer.communicate()
    assert reader.scan() == {key(0): 0, key(3): 3}

    heir = HostSegment.adopt(path)
    assert heir.writer_pid == os.getpid() and reader.writer_runs()
    assert not heir.read_into(2, key(2), room()) and not heir.read_into(2, key(9), room())
    heir.write(2, key(5), block(5))
    into = room()
    assert reader.read_into(2, key(5), into) and same(into, block(5))
    assert reader.scan() == {key(0): 0, key(5): 2, key(3): 3}
    heir.release(range(SLOTS))
    assert heir.held_bytes() == 2 * 4096
    heir.close()
    reader.close()


def test_a_writer_that_closes_gives_the_segment_up(segment: HostSegment, path: Path) -> None:
    """After close, in the same process too, the segment is adopted as it is; close may be repeated."""
    segment.write(0, key(1), block(1))
    segment.close()
    segment.close()
    heir = HostSegment.adopt(path)
    assert heir.scan() == {key(1): 0}
    assert heir.read_into(0, key(1), room())
    heir.close()


def test_copies_in_threads_do_not_mix(segment: HostSegment) -> None:
    """Threads that write and read slots of their own at once each get back what they wrote."""
    wrong: list[int] = []

    def work(slot: int) -> None:
        for turn in range(50):
            number, into = slot * 1000 + turn, room()
            segment.write(slot, key(number), block(number))
            if not (segment.read_into(slot, key(number), into) and same(into, block(number))):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_nothing_of_a_block_is_left_for_the_next(segment: HostSegment, path: Path) -> None:
    """A slot that was released holds zeros. One that was written anew is read as the new block alone: not under the old
    key, nor in the old length."""
    segment.write(0, key(1), block(1))
    segment.write(1, key(2), block(2))
    content = b"".join(piece.tobytes() for piece in block(1))
    assert content[:64] in path.read_bytes()
    segment.release([0])
    kept = path.read_bytes()
    assert all(piece.tobytes() not in kept for piece in block(1))
    assert any(piece.tobytes() in kept for piece in block(2)), "it can be seen in the file"
    short = [np.full(8, 7, np.uint8)]
    segment.write(1, key(3), short)
    for wanted in (key(2), key(3)):
        assert not segment.read_into(1, wanted, room())
    assert not segment.read_into(1, key(2), [np.zeros(8, np.uint8)])
    assert segment.read_into(1, key(3), short)
