"""The lease board: one shared-memory table per device, through which agent and engines talk without any RPC.

    file   | header 4 KiB | row 0 | row 1 | ... | row N-1 |      each row 2 KiB
    row    | text: engine id, model | agent's words | replica's words | engine's words |

Every word is an aligned unsigned 64-bit integer with exactly one writing process, stored and loaded with one machine
instruction, so a reader sees the old or the new value, never a mixture. Words that hold a float have a C double's 64
bits. The lease is one word, because limit and revision must be read together:

    63            32 31             0
    |  revision     |  limit / 64 KiB |

The agent creates the file and survives in it: a restarted agent opens the same file and finds limits, guarantees and
the engines' process ids. Only the start-up code that owns the cluster unlinks it.
"""

import mmap
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from memory_agent.errors import BoardError

MAGIC = 0x454C4C4D_424F4152  # "ELLMBOAR"
VERSION = 7
LIMIT_UNIT_BYTES = 64 * 1024
MAX_ROWS = 32
MAX_WORKERS = 8
NO_FD = (1 << 64) - 1
"""In place of a file descriptor: no file backs the memory. That of a GPU is the driver's."""
_HEADER_BYTES = 4096
_ROW_BYTES = 2048
_TEXT_BYTES = 256
WORDS_OF_A_ROW = (_ROW_BYTES - _TEXT_BYTES) // 8
MAX_NAME_BYTES = _TEXT_BYTES // 2 - 1
"""Longest engine id or model name, in UTF-8; longer ones are cut."""
_REVISION_MASK = (1 << 32) - 1
_UNSIGNED, _DOUBLE = struct.Struct("=Q"), struct.Struct("=d")


class RowState(IntEnum):
    """Life of a row. Written by the agent alone."""

    FREE = 0
    STARTING = 1
    """Registered; the engine's processes are not on the board yet, nor are they started before the limit has reached
    START_BYTES."""
    LIVE = 2
    LEAVING = 3
    """Unregistered, or its scheduler process has exited, while one of its processes may still hold memory."""


class AgentWord(IntEnum):
    """Words of a row that the agent writes."""

    STATE = 0
    LEASE = 1
    EXPOSURE_BYTES = 2
    """Highest limit issued since the one the engine last acknowledged."""
    GUARANTEE_BYTES = 3
    CEILING_BYTES = 4
    WEIGHTS_BYTES = 5
    """Charged to the engine from its registration to the exit of its last process."""
    REGISTERED_NS = 6
    """time.monotonic_ns() of the registration: who came first starts first."""
    REGISTRAR_PID = 7
    """Process that registered the engine; a row that is still STARTING dies with it."""
    WEIGHT_MILLI = 8
    TARGET_BYTES = 9
    """The limit the agent is working towards: above the lease while neighbours are still giving memory back."""
    REGISTRAR_START = 10
    """Start time of REGISTRAR_PID in clock ticks since boot, 0 where unknown: with it a reused pid is not mistaken."""
    ENGINE_START = 11
    """Start time of the engine's PID, likewise."""
    START_BYTES = 12
    """Of the budget, what the start takes: KV memory that is mapped at once, and what loading holds for a while."""
    BORROW_COUNT = 13
    """Since the registration: raises of the limit above the guarantee, and their bytes."""
    BORROW_BYTES = 14
    LEND_COUNT = 15
    """Likewise: cuts of the limit below the guarantee."""
    LEND_BYTES = 19
    WORKER_START_0 = 80
    """WORKER_START_0 + i: start time of worker i, likewise, up to MAX_WORKERS."""


class ReplicaWord(IntEnum):
    """Words of a row that the replica process writes: the controller's target, for the engine to read each step."""

    TARGET_REVISION = 16
    TOKEN_BUDGET_MAX = 17
    """0 means no bound beyond the engine's own settings."""
    ACTIVE_MAX = 18
    """0 means no bound beyond the engine's own settings."""


class EngineWord(IntEnum):
    """Words of a row that the engine's scheduler process writes."""

    PID = 32
    """Stored last, after the WORKER words: it makes the row LIVE. Until then the engine holds no more than START_BYTES,
    and from then on no more than its KV memory, and activations where they are charged."""
    APPLIED_REVISION = 33
    """Revision of the lease the engine follows now. Stored after COMMITTED_BYTES: whoever reads this word first and
    COMMITTED_BYTES second sees a count that is at least as new as the acknowledgement."""
    COMMITTED_BYTES = 34
    """What the engine may hold at this moment: KV memory that is mapped, being mapped and not yet unmapped, and
    ACTIVATION_BYTES."""
    USED_BYTES = 35
    """Bytes of KV blocks that requests reference now; the rest of COMMITTED is free or prefix cache."""
    DEMAND_BYTES = 36
    """What the engine could use now: running requests, waiting prompts and its reserve."""
    REST_BYTES = 37
    """What the engine shrinks to when it has been idle for a while."""
    RUNNING = 38
    WAITING = 39
    STEPS = 40
    HEARTBEAT_NS = 41
    """time.monotonic_ns() of the last step: it stands still while the engine is idle."""
    BUSY = 42
    """1 while the scheduler has anything to do."""
    PREEMPTIONS = 43
    INFLATE_COUNT = 44
    INFLATE_BYTES = 45
    DEFLATE_COUNT = 46
    DEFLATE_BYTES = 47
    BLOCK_BYTES = 48
    BLOCK_TOKENS = 49
    BLOCKS_CEILING = 50
    BLOCKS_MAPPED = 51
    MAP_FAILURES = 52
    TARGET_REVISION_APPLIED = 53
    INFLATE_NS = 54
    """Time that workers spent mapping, summed over moves (slowest rank)."""
    ACTIVATION_BYTES = 55
    """The activations' part of COMMITTED_BYTES: the most that steps since the last trim can have taken."""
    ACTIVATION_HELD_BYTES = 56
    """Measured in the workers after the last step that was reported: what a trim would give back."""
    TOKEN_BUDGET = 57
    """Most tokens of a step that the lease allowed last."""
    CONSERVATION_FAILURES = 58
    """Checks of the engine's own books that failed."""
    FLOOR_BYTES = 59
    """What an engine without requests must keep to take one up: REST_BYTES and the smallest step's activations."""
    WORKER_COUNT = 60
    WORKER_PID_0 = 61
    """WORKER_PID_0 + i: process id of worker i, up to MAX_WORKERS."""
    WORKER_FD_0 = 61 + MAX_WORKERS
    """WORKER_FD_0 + i: number, in worker i, of the file descriptor that backs its KV memory, or NO_FD."""
    HOST_STORED_TAILS = 77
    """Since the start: of HOST_STORED_BLOCKS, the last, partly filled ones of preempted requests."""
    HOST_LOADED_TAILS = 78
    """Since the start: of HOST_LOADED_BLOCKS, likewise."""
    HOST_BYTES = 88
    """Bytes of the host buffer's slots that are taken, over all workers."""
    HOST_STORED_BLOCKS = 89
    """Since the start: blocks written to the host buffer."""
    HOST_LOADED_BLOCKS = 90
    """Since the start: blocks that came back from it instead of being computed again."""
    DEFLATE_NS = 91
    """Likewise unmapping."""
    HOST_EVICTED_BLOCKS = 92
    """Since the start: blocks that had to leave the host buffer for others."""
    HOST_DAMAGED_BLOCKS = 93
    """Since the start: blocks that were not found whole, and were computed again."""
    HOST_LOGICAL_BYTES = 94
    """Most KV memory of requests that may be set aside, over all workers, so that prompts are computed early."""
    SET_ASIDE = 95
    """Since the start: requests that were set aside for a prompt."""
    MAX_NUM_SEQS = 96
    """Of the engine's own settings, as MAX_NUM_BATCHED_TOKENS: no target lets it go beyond them."""
    MAX_NUM_BATCHED_TOKENS = 97
    KV_TOKENS = 98
    """Tokens that running requests have computed or loaded, over all of them."""
    STEP_S = 99
    """A float, as all words from here on. This one and the next four are the parts of a step's time as learned from the
    engine's steps, all 0 until there are enough; each is of the newest fit or of the one before."""
    ROW_S = 100
    KV_TOKEN_S = 101
    TOKEN_S = 102
    PAIR_S = 103
    TPOT_S = 104
    """Time per token after the first that one answer in ten exceeds, of those that run and that ended lately; 0 where
    there are none."""
    TPOT_TARGET_S = 105
    """The tightest objective for it that a request here has; 0 where none has one."""
    TTFT_SHARE = 106
    """Of its objective for the first token, what a request that waits for it has used: the most of all; 0 for none."""
    PROMPT_TOKENS = 107
    """Of a prompt, mean of the recent ones; 0 before the first."""
    PROMPT_OF_TOKEN = 108
    """Tokens of the prompt that a prompt's token is in, mean over their tokens: long ones weigh more."""
    PROMPT_RATE = 109
    """Tokens of prompts that were computed a second, over about the last half minute."""
    HOST_CAPACITY_BYTES = 110
    """An integer again, as all words from here on. Size of the host buffer, over all workers."""
    HOST_HITS = 111
    """Since the start: blocks that requests asked the host buffer for and that were there; HOST_MISSES: were not."""
    HOST_MISSES = 112
    HOST_STORES_MOVED = 113
    """Since the start, what break-even has decided: blocks to store, and to load, because it pays (MOVED), to learn
    whether it does (PROBED), or not at all, because computing them again is cheaper (DECLINED)."""
    HOST_STORES_PROBED = 114
    HOST_STORES_DECLINED = 115
    HOST_LOADS_MOVED = 116
    HOST_LOADS_PROBED = 117
    HOST_LOADS_DECLINED = 118


@dataclass(frozen=True)
class Lease:
    """What one engine may hold now.

    Attributes:
        limit_bytes: upper bound on the engine's committed bytes, KV and activations; a multiple of LIMIT_UNIT_BYTES.
        revision: grows by one with every change; wraps at 2**32.
    """

    limit_bytes: int
    revision: int

    def pack(self) -> int:
        return (self.revision & _REVISION_MASK) << 32 | self.limit_bytes // LIMIT_UNIT_BYTES

    @classmethod
    def unpack(cls, word: int) -> "Lease":
        return cls(limit_bytes=(word & _REVISION_MASK) * LIMIT_UNIT_BYTES, revision=word >> 32)


class Row:
    """One engine's row. Which words a process may set follows from the enums above; nothing enforces it between
    processes."""

    def __init__(self, board: "LeaseBoard", index: int) -> None:
        if not 0 <= index < MAX_ROWS:
            raise BoardError(f"row {index} is not on the board: rows are 0 to {MAX_ROWS - 1}")
        self.index = index
        self._text_at = _HEADER_BYTES + index * _ROW_BYTES
        self._words_at = (self._text_at + _TEXT_BYTES) // 8
        self._board = board

    def get(self, word: int) -> int:
        """The word's value, one load."""
        return self._board.words[self._words_at + word]

    def set(self, word: int, value: int) -> None:
        """Store ``value`` (0 to 2**64 - 1), one store."""
        self._board.words[self._words_at + word] = value

    def get_float(self, word: int) -> float:
        """The value of a word that holds a float, one load."""
        value: float = _DOUBLE.unpack(_UNSIGNED.pack(self.get(word)))[0]
        return value

    def set_float(self, word: int, value: float) -> None:
        """Store a float, one store."""
        self.set(word, _UNSIGNED.unpack(_DOUBLE.pack(value))[0])

    @property
    def lease(self) -> Lease:
        return Lease.unpack(self.get(AgentWord.LEASE))

    @property
    def state(self) -> RowState:
        return RowState(self.get(AgentWord.STATE))

    @property
    def engine_id(self) -> str:
        return self._board.read_text(self._text_at)

    @property
    def model(self) -> str:
        return self._board.read_text(self._text_at + _TEXT_BYTES // 2)

    @property
    def workers(self) -> list[tuple[int, int]]:
        """(process id, file descriptor number or NO_FD) of each worker."""
        count = min(self.get(EngineWord.WORKER_COUNT), MAX_WORKERS)
        return [(self.get(EngineWord.WORKER_PID_0 + i), self.get(EngineWord.WORKER_FD_0 + i)) for i in range(count)]

    def clear(self) -> None:
        """Agent only: make the row FREE, then zero its words and text.

        The state goes first: an agent that dies half-way leaves a FREE row with old words, which the next
        registration clears again, and never a row in use that has lost its lease.
        """
        self.set(AgentWord.STATE, RowState.FREE)
        for word in range(WORDS_OF_A_ROW):
            self.set(word, 0)
        self.name("", "")

    def name(self, engine_id: str, model: str) -> None:
        """Agent only, before the row leaves FREE."""
        self._board.write_text(self._text_at, engine_id)
        self._board.write_text(self._text_at + _TEXT_BYTES // 2, model)


class LeaseBoard:
    """The mapped file. Raises BoardError where a file is missing, too short, or of another version."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._map = mmap.mmap(fd, _HEADER_BYTES + MAX_ROWS * _ROW_BYTES)
        os.close(fd)
        self.words = memoryview(self._map).cast("Q")

    @classmethod
    def create(cls, path: Path, budget_bytes: int, weights_bytes: int = 0) -> "LeaseBoard":
        """Make the file, readable by the owner alone; an existing board of this version is opened as it is.

        A board whose creator died half-way (no magic yet, so nobody has used it) is finished here. Agent only: one
        process at a time may create.
        """
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if os.fstat(fd).st_size == 0:
            os.ftruncate(fd, _HEADER_BYTES + MAX_ROWS * _ROW_BYTES)
        board = cls._map_file(path, fd)
        if board.words[0] == 0:
            board.words[1] = VERSION
            board.words[2] = budget_bytes
            board.words[3] = time.time_ns()
            board.words[5] = weights_bytes
            board.words[0] = MAGIC
        board._check_version()
        return board

    @classmethod
    def open(cls, path: Path | str) -> "LeaseBoard":
        """Map an existing board. Raises BoardError where it is missing or not a board of this version."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise BoardError(f"no lease board at {path}: {error.strerror}; is the memory agent running?") from error
        board = cls._map_file(Path(path), fd)
        board._check_version()
        return board

    @classmethod
    def _map_file(cls, path: Path, fd: int) -> "LeaseBoard":
        if os.fstat(fd).st_size != _HEADER_BYTES + MAX_ROWS * _ROW_BYTES:
            os.close(fd)
            raise BoardError(f"{path} is not a lease board of version {VERSION}: its size differs")
        return cls(path, fd)

    def _check_version(self) -> None:
        if self.words[0] != MAGIC or self.words[1] != VERSION:
            found = self.words[1]
            self.close()
            raise BoardError(
                f"{self.path} is not a lease board of version {VERSION} (found version {found}); "
                "restart the cluster so that agent and engines are of one release"
            )

    @property
    def budget_bytes(self) -> int:
        """KV bytes that the engines of this device share. Written by the agent."""
        return self.words[2]

    @budget_bytes.setter
    def budget_bytes(self, value: int) -> None:
        self.words[2] = value

    @property
    def weights_bytes(self) -> int:
        """Bytes beside the budget that are set aside for the engines' weights; what these take beyond them is taken
        from the budget. Written by the agent."""
        return self.words[5]

    @weights_bytes.setter
    def weights_bytes(self, value: int) -> None:
        self.words[5] = value

    @property
    def dead_engines(self) -> int:
        """Engines of this device that ended without unregistering. Written by the agent."""
        return self.words[4]

    @dead_engines.setter
    def dead_engines(self, value: int) -> None:
        self.words[4] = value

    def row(self, index: int) -> Row:
        """Row ``index``, whatever its state. Raises BoardError outside 0 to MAX_ROWS - 1."""
        return Row(self, index)

    def rows(self) -> Iterator[Row]:
        """Every row that is not FREE."""
        for index in range(MAX_ROWS):
            row = Row(self, index)
            if row.get(AgentWord.STATE) != RowState.FREE:
                yield row

    def read_text(self, at: int) -> str:
        raw = self._map[at : at + _TEXT_BYTES // 2]
        return raw[: raw.index(0)].decode("utf-8", errors="replace")

    def write_text(self, at: int, text: str) -> None:
        raw = text.encode("utf-8")[:MAX_NAME_BYTES]
        self._map[at : at + _TEXT_BYTES // 2] = raw.ljust(_TEXT_BYTES // 2, b"\0")

    def close(self) -> None:
        self.words.release()
        self._map.close()
