"""The host segment: one rank's host buffer, KV blocks in a file in shared memory that outlives its engine.

    file    | header 4 KiB | slot headers, 64 B each | pad | slot 0 | slot 1 | ...      slots aligned to 4 KiB
    header  | magic | version | slot bytes | slots | writer's pid | its start time | fingerprint |
    slot    | generation | key | length | checksum |         generation: odd while the slot is being written

One process writes; any process of the same user reads, without a lock: it copies first and then looks whether what it
copied was the block. A torn block is never taken for a whole one, because

- the generation is the same even number before and after the copy, and
- the checksum is that of the copy itself: it also finds memory that went bad, and it decides where a machine's weak
  memory order lets the words above arrive out of turn.

Payload moves by ``pwritev`` and ``preadv``, not through a mapping: all pieces of a block in one system call that leaves
Python's lock to others, a full file system is an error and not a signal, and a read of a released slot commits nothing.
"""

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import psutil
from numpy.typing import NDArray

from memory_agent.block_checksum import block_checksum
from memory_agent.errors import MemoryError_, OutOfDeviceMemory, SettingsError
from memory_agent.kv_fingerprint import FINGERPRINT_BYTES
from memory_agent.processes import ExitWatch, start_time
from memory_agent.vmm import ContractViolation

Part = NDArray[Any]
"""A piece of a block, or a two-dimensional array of which each row is one: ``kv[:, b]`` of a KV cache
``kv[layer, block, byte]``. Its last axis is contiguous and a multiple of 8 bytes long."""
Words = NDArray[np.uint64]
"""A part as the copies see it: two-dimensional, rows contiguous."""

MAGIC = 0x454C4C4D_484F5354  # "ELLMHOST"
VERSION = 1
KEY_BYTES = 32
_PAGE = mmap.PAGESIZE
_HEADER_BYTES = 4096
_SLOT_HEADER_BYTES = 64
_BLOCK_BYTES = 512
_PIECES_A_CALL = os.sysconf("SC_IOV_MAX")
_HEADER = struct.Struct("=6Q32s")
_WRITER_PID, _WRITER_START = 4, 5  # words of the header
_SLOT_HEADER = struct.Struct("=Q32sQQ")
_GENERATION, _KEY, _LENGTH, _CHECKSUM = 0, 1, 5, 6  # words of a slot's header


def host_segment_path(board: Path, row: int, rank: int) -> Path:
    """The segment of worker ``rank`` of the engine in ``row`` lies beside its lease board, on the same node."""
    return board.with_name(f"{board.stem}-host{row}-{rank}")


class StoredBlock(NamedTuple):
    """What a slot says of the block in it. ``checksum``: as its writer divided it, so that only who knows its parts can
    check it."""

    key: bytes
    length: int
    checksum: int


class SegmentError(MemoryError_):
    """The host segment cannot be used: missing, foreign, of another version, or another process writes it."""


class HostSegment:
    """A mapped segment: made by ``create``, ``adopt`` (both may write) or ``open`` (reads only).

    Calls for different slots may run in several threads at once, writes of one slot only one after the other. The file
    stays when its processes end; whoever owns the cluster's files unlinks it.

    Attributes:
        path: of the file.
        slots: number of slots.
        slot_bytes: most payload of a slot.
        fingerprint: what the blocks belong to (``memory_agent.kv_fingerprint``), 32 bytes.
    """

    def __init__(self, path: Path, fd: int, writable: bool) -> None:
        """Take over ``fd``, an open segment file; use ``create``, ``adopt`` or ``open`` instead."""
        self.path = path
        self._fd = fd
        self._writable = writable
        header = os.pread(fd, _HEADER.size, 0).ljust(_HEADER.size, b"\0")
        magic, version, self.slot_bytes, self.slots, _, _, self.fingerprint = _HEADER.unpack(header)
        if (magic, version) != (MAGIC, VERSION):
            raise SegmentError(
                f"{path} is no host segment of version {VERSION}, or was never finished; remove it and start again"
            )
        self._stride, self._slots_at, file_bytes = _layout(self.slot_bytes, self.slots)
        if os.fstat(fd).st_size != file_bytes:
            raise SegmentError(f"{path} is not the {file_bytes} bytes long that its header says; remove it")
        # A writer maps the slots too, untouched, because holes are punched by address. Readers need the words alone.
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._map = mmap.mmap(fd, file_bytes if writable else self._slots_at, prot=protection)
        self._bytes = memoryview(self._map)
        self._words = self._bytes[: self._slots_at].cast("Q")

    @classmethod
    def create(cls, path: Path, slot_bytes: int, slots: int, fingerprint: bytes) -> Self:
        """Make the file, readable by its owner alone, with every slot empty; only the headers take memory yet.

        Raises:
            SettingsError: it could never be filled: the message says how many slots fit.
            SegmentError: the file exists.
        """
        if slot_bytes <= 0 or slots <= 0 or len(fingerprint) != FINGERPRINT_BYTES:
            raise SettingsError(
                f"a host buffer of {slots} slots of {slot_bytes} bytes with a fingerprint of {len(fingerprint)} bytes "
                f"cannot hold anything; it takes at least one slot of one byte and {FINGERPRINT_BYTES} bytes"
            )
        _check_room(path.parent, slot_bytes, slots)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError as error:
            raise SegmentError(f"{path} exists already; adopt it, or remove it when its engine has ended") from error
        try:
            _, slots_at, file_bytes = _layout(slot_bytes, slots)
            os.ftruncate(fd, file_bytes)
            # Committed now, so that a store into the mapped words can never be one into a full file system.
            os.posix_fallocate(fd, 0, slots_at)
            pid = os.getpid()
            os.pwrite(fd, _HEADER.pack(MAGIC, VERSION, slot_bytes, slots, pid, start_time(pid), fingerprint), 0)
            return cls(path, fd, writable=True)
        except BaseException as error:
            os.close(fd)
            path.unlink()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise OutOfDeviceMemory(f"no memory for the headers of {path}: {error.strerror}") from error
            raise

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map an existing segment to read it. Raises SegmentError where it is missing or no segment."""
        return cls._open(path, writable=False)

    @classmethod
    def adopt(cls, path: Path) -> Self:
        """Become the writer of a segment whose writer has ended; what is whole in it stays.

        Raises SegmentError where it is missing, no segment, or its writer still runs. Of several adopters one wins.
        """
        segment = cls._open(path, writable=True)
        fcntl.flock(segment._fd, fcntl.LOCK_EX)
        try:
            pid, running = segment.writer_pid, segment.writer_runs()
            if not running:
                segment._words[_WRITER_START] = start_time(os.getpid())
                segment._words[_WRITER_PID] = os.getpid()
        finally:
            fcntl.flock(segment._fd, fcntl.LOCK_UN)
        if running:
            segment._writable = False
            segment.close()
            raise SegmentError(f"process {pid} writes {path} and still runs; open it to read, or end that process")
        return segment

    @classmethod
    def _open(cls, path: Path, writable: bool) -> Self:
        try:
            fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise SegmentError(f"no host segment at {path}: {error.strerror}; has its engine started?") from error
        try:
            return cls(path, fd, writable)
        except BaseException:
            os.close(fd)
            raise

    @property
    def writer_pid(self) -> int:
        """The process that writes, or wrote until it died; 0 after it closed."""
        return self._words[_WRITER_PID]

    def writer_runs(self) -> bool:
        """Whether the process that writes this segment is alive. A stopped one is; a zombie is not."""
        pid = self.writer_pid
        if not pid:
            return False
        watch = ExitWatch[str]()
        try:
            watch.add("writer", pid, self._words[_WRITER_START])
            return not watch.collect()
        except ProcessLookupError:
            return False
        finally:
            watch.close()

    def held_bytes(self) -> int:
        """Bytes that the file really takes, headers included."""
        return os.fstat(self._fd).st_blocks * _BLOCK_BYTES

    def write(self, slot: int, key: bytes, parts: Sequence[Part]) -> None:
        """Store ``parts`` one after the other under ``key``, in place of what the slot held.

        Args:
            key: 32 bytes, which say all about the content: two blocks with one key are equal.
            parts: together at most ``slot_bytes``; not changed meanwhile. Few parts of many rows are fastest.

        Raises OutOfDeviceMemory when there is no memory to commit: the slot is empty and takes no memory then.
        """
        words = [_words(part) for part in parts]
        length = sum(part.nbytes for part in words)
        if len(key) != KEY_BYTES or not 0 < length <= self.slot_bytes:
            raise ContractViolation(
                f"{length} bytes under a key of {len(key)}: a slot takes 1 to {self.slot_bytes}, a key has {KEY_BYTES}"
            )
        self._write(slot, StoredBlock(key, length, block_checksum(key, words)), words)

    def write_copy(self, slot: int, block: StoredBlock, data: Part) -> None:
        """Store a block as another segment has it: ``data`` are its bytes, in one row. Raises as ``write`` does."""
        words = _words(data)
        if len(block.key) != KEY_BYTES or words.nbytes != block.length or not 0 < block.length <= self.slot_bytes:
            raise ContractViolation(f"{words.nbytes} bytes are no copy of a block of {block.length}")
        self._write(slot, block, [words])

    def read_copy(self, slot: int, room: Part) -> StoredBlock | None:
        """Copy whatever block the slot holds to the beginning of ``room``, one row of ``slot_bytes`` or more; None
        where it holds none, or another one came meanwhile. Its checksum is not looked at."""
        before = self._read_header(slot)
        generation, key, length, checksum = before
        if generation % 2 or not 0 < length <= self.slot_bytes:
            return None
        copied = self._transfer(os.preadv, [_words(room[:length])], slot)
        whole = copied == length and self._read_header(slot) == before
        return StoredBlock(key, length, checksum) if whole else None

    def read_into(self, slot: int, key: bytes, parts: Sequence[Part]) -> bool:
        """Copy the block ``key`` from ``slot`` into ``parts``; False where the slot does not hold it, whole.

        parts: writable, divided as the parts that were written. After False their content is undefined.
        """
        if not 0 <= slot < self.slots:
            return False
        words = [_words(part) for part in parts]
        length = sum(part.nbytes for part in words)
        before = self._read_header(slot)
        generation, stored_key, stored_length, checksum = before
        if generation % 2 or stored_key != key or stored_length != length:
            return False
        copied = self._transfer(os.preadv, words, slot)
        return copied == length and block_checksum(key, words) == checksum and self._read_header(slot) == before

    def release(self, slots: Iterable[int]) -> None:
        """Empty these slots: their bytes are back with the operating system when this returns."""
        for slot in slots:
            at = self._header_at(slot)
            self._begin(at)
            self._empty(slot)

    def scan(self) -> dict[bytes, int]:
        """The slot of every key that is stored; slots that were being written are left out. Checksums are not read."""
        found = {}
        for slot in range(self.slots):
            generation, key, length, _ = before = self._read_header(slot)
            if length and generation % 2 == 0 and self._read_header(slot) == before:
                found[key] = slot
        return found

    def close(self) -> None:
        """Unmap, and write no more: another process may adopt the file, which stays with what is in it."""
        if self._fd < 0:
            return
        if self._writable:
            self._words[_WRITER_PID] = 0
        self._words.release()
        self._bytes.release()
        self._map.close()
        os.close(self._fd)
        self._fd = -1

    def _write(self, slot: int, block: StoredBlock, words: Sequence[Words]) -> None:
        at = self._header_at(slot)
        writing = self._begin(at)
        try:
            stored = self._transfer(os.pwritev, words, slot)
        except OSError as error:
            self._empty(slot)
            if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                raise
            stored = 0
        if stored != block.length:
            self._empty(slot)
            raise OutOfDeviceMemory(
                f"no memory for {block.length} bytes in {self.path}, which takes {self.held_bytes()}: "
                "the machine's memory or the shared memory file system is full; make the host buffer smaller"
            )
        key_at = (at + _KEY) * 8
        self._bytes[key_at : key_at + KEY_BYTES] = block.key
        self._words[at + _LENGTH] = block.length
        self._words[at + _CHECKSUM] = block.checksum
        self._words[at + _GENERATION] = writing + 1

    def _begin(self, at: int) -> int:
        """Make the slot's generation odd, a number it never had, and return it."""
        generation = (self._words[at + _GENERATION] + 1) | 1
        self._words[at + _GENERATION] = generation
        return generation

    def _empty(self, slot: int) -> None:
        """Punch out a slot whose generation is odd, and make it even."""
        at = self._header_at(slot)
        self._words[at + _LENGTH] = 0
        self._map.madvise(mmap.MADV_REMOVE, self._slots_at + slot * self._stride, self._stride)
        self._words[at + _GENERATION] += 1

    def _header_at(self, slot: int) -> int:
        """The first word of the slot's header, to write it."""
        if not self._writable:
            raise ContractViolation(f"{self.path} was opened to read: only its writer changes slots")
        if not 0 <= slot < self.slots:
            raise ContractViolation(f"slot {slot} does not exist: slots are 0 to {self.slots - 1}")
        return (_HEADER_BYTES + slot * _SLOT_HEADER_BYTES) // 8

    def _read_header(self, slot: int) -> tuple[int, bytes, int, int]:
        """Generation, key, length and checksum."""
        at = _HEADER_BYTES + slot * _SLOT_HEADER_BYTES
        generation, key, length, checksum = _SLOT_HEADER.unpack_from(self._bytes, at)
        return generation, key, length, checksum

    def _transfer(self, call: Callable[..., int], parts: Sequence[Words], slot: int) -> int:
        """Read or write the rows of the parts at the slot; the bytes done, fewer where the system stopped."""
        pieces = [row for part in parts for row in part]
        start = self._slots_at + slot * self._stride
        done = 0
        for at in range(0, len(pieces), _PIECES_A_CALL):
            batch = pieces[at : at + _PIECES_A_CALL]
            moved = call(self._fd, batch, start + done)
            done += moved
            if moved < sum(piece.nbytes for piece in batch):
                break
        return done


def _words(part: Part) -> Words:
    try:
        words = np.atleast_2d(part).view(np.uint64)
    except ValueError as error:
        raise ContractViolation(f"a part of a block is not contiguous or no multiple of 8 bytes: {error}") from error
    if words.ndim != 2:
        raise ContractViolation(f"a part of a block has shape {part.shape}: one row, or rows, of bytes are expected")
    return words


def _layout(slot_bytes: int, slots: int) -> tuple[int, int, int]:
    """Bytes from slot to slot, offset of the first slot, bytes of the file."""
    stride = -(-slot_bytes // _PAGE) * _PAGE
    slots_at = -(-(_HEADER_BYTES + slots * _SLOT_HEADER_BYTES) // _PAGE) * _PAGE
    return stride, slots_at, slots_at + slots * stride


def _check_room(folder: Path, slot_bytes: int, slots: int) -> None:
    """Raise SettingsError unless the segment, filled, fits into the file system and the machine's free memory."""
    try:
        system = os.statvfs(folder)
    except OSError as error:
        raise SettingsError(f"no host buffer in {folder}: {error.strerror}; give it a folder like /dev/shm") from error
    memory, files = int(psutil.virtual_memory().available), system.f_bavail * system.f_frsize
    stride, _, file_bytes = _layout(slot_bytes, slots)
    room = min(memory, files)
    if file_bytes > room:
        fit = max(0, room - _HEADER_BYTES - _PAGE) // (stride + _SLOT_HEADER_BYTES)
        raise SettingsError(
            f"a host buffer of {slots} slots of {slot_bytes} bytes takes {file_bytes} bytes; {memory} bytes of memory "
            f"are free, and {files} in {folder}: at most {fit} slots fit"
        )
