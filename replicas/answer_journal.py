"""What a replica remembers of answers whose requests have a key: a client that has lost its ingress gets them again.

    attempt --Mark: key, request, tokens before it--> entry <-- each token that the engine gives
    any ingress --key, request--> Found: all tokens so far, how they ended, whether somebody still takes them

In memory, and bounded: an entry is kept for some minutes after its end, and where there are too many of them, or too
many tokens, the oldest goes first, those that have ended before those that run. It knows keys and requests by their
digests alone.
"""

import math
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from vllm.v1.engine import EngineCoreOutput, FinishReason

from replicas.engine_host import Outlet

KEPT_S = 600.0
MOST_ENTRIES = 4096
MOST_TOKENS = 1 << 22
"""16 MiB."""
_UNFINISHED = (None, FinishReason.ABORT, FinishReason.ERROR)


@dataclass(frozen=True)
class Mark:
    """By which an answer is found again. Travels with each attempt of a request that has a key.

    Attributes:
        key: digest of the client's key and whose it is; request: digest of what is asked.
        token_ids: of the answer, from attempts before this one.
    """

    key: bytes
    request: bytes
    token_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Found:
    """What a replica knows of an answer.

    Attributes:
        request: digest of what was asked with the key.
        finish_reason, stop_reason: the engine's, where it has given the whole answer.
        live: it runs, for somebody who takes it.
    """

    replica: str
    request: bytes
    token_ids: list[int]
    live: bool = False
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class Taker(Outlet, Protocol):
    """Where an attempt's outputs go: ``replicas.output_channel.Lane`` is one."""

    @property
    def lost(self) -> bool:
        """Whoever took them cannot be reached now."""

    def give_up(self) -> None:
        """End the attempt: nobody waits for it."""


@dataclass(eq=False)
class Entry:
    """One answer. ended_s: infinity while it runs."""

    key: bytes
    request: bytes
    taker: Taker
    token_ids: "array[int]"
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    ended_s: float = math.inf

    @property
    def runs(self) -> bool:
        return self.ended_s == math.inf


class AnswerJournal:
    """Of one replica. Used by one thread."""

    def __init__(
        self,
        replica: str,
        clock: Callable[[], float] = time.monotonic,
        most_entries: int = MOST_ENTRIES,
        most_tokens: int = MOST_TOKENS,
    ) -> None:
        """replica: its id, which ``find`` tells."""
        self.tokens = 0
        """Of all entries."""
        self._replica, self._clock = replica, clock
        self._most_entries, self._most_tokens = most_entries, most_tokens
        self._running: dict[bytes, Entry] = {}
        self._ended: dict[bytes, Entry] = {}
        """Both by key, the oldest first."""

    def __len__(self) -> int:
        return len(self._running) + len(self._ended)

    def begin(self, mark: Mark, taker: Taker) -> Entry:
        """An attempt begins: its entry takes the place of an earlier one."""
        self._drop(mark.key)
        entry = self._running[mark.key] = Entry(mark.key, mark.request, taker, array("i", mark.token_ids))
        self.tokens += len(entry.token_ids)
        self._keep_bounds()
        return entry

    def write(self, entry: Entry, output: EngineCoreOutput) -> None:
        """The engine has given ``output``. An entry that has been dropped or replaced stays so."""
        if self._running.get(entry.key) is not entry:
            return
        entry.token_ids.extend(output.new_token_ids)
        self.tokens += len(output.new_token_ids)
        if output.finish_reason not in _UNFINISHED:
            entry.finish_reason, entry.stop_reason = output.finish_reason, output.stop_reason
        self._keep_bounds()

    def end(self, entry: Entry) -> None:
        """The attempt is over, whatever has ended it."""
        if self._running.get(entry.key) is entry:
            self._ended[entry.key] = self._running.pop(entry.key)
            entry.ended_s = self._clock()

    def find(self, key: bytes, request: bytes) -> Found | None:
        """What there is under ``key``. An attempt at ``request`` whose taker is lost ends: whoever asks takes over."""
        self._keep_bounds()
        entry = self._running.get(key) or self._ended.get(key)
        if entry is None:
            return None
        live = entry.runs and not entry.taker.lost
        if entry.runs and not live and entry.request == request:
            entry.taker.give_up()
            self.end(entry)  # what its engine gives until it has stopped is in no answer any more
        return Found(
            self._replica, entry.request, entry.token_ids.tolist(), live, entry.finish_reason, entry.stop_reason
        )

    @contextmanager
    def recorded(self, mark: Mark | None, taker: Taker) -> Iterator[Outlet]:
        """Where an attempt's outputs are to go, so that they are written here on their way; to ``taker`` itself where
        the request has no key."""
        if mark is None:
            yield taker
            return
        entry = self.begin(mark, taker)
        try:
            yield _Recorder(self, entry)
        finally:
            self.end(entry)

    def _keep_bounds(self) -> None:
        now_s = self._clock()
        while self._ended and (
            len(self) > self._most_entries
            or self.tokens > self._most_tokens
            or next(iter(self._ended.values())).ended_s + KEPT_S <= now_s
        ):
            self._drop(next(iter(self._ended)))
        while len(self) > self._most_entries or self.tokens > self._most_tokens:
            self._drop(next(iter(self._running)))

    def _drop(self, key: bytes) -> None:
        for entries in (self._running, self._ended):
            if (entry := entries.pop(key, None)) is not None:
                self.tokens -= len(entry.token_ids)


class _Recorder:
    """The outlet of an attempt that is written down."""

    def __init__(self, journal: AnswerJournal, entry: Entry) -> None:
        self.ended = entry.taker.ended
        self._journal, self._entry = journal, entry

    def put(self, output: EngineCoreOutput) -> None:
        self._journal.write(self._entry, output)  # before it belongs to the taker
        self._entry.taker.put(output)
