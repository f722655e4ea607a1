"""The source's side of a migration: the full KV blocks of a running request go to staging memory while it decodes.

    rounds   blocks that were filled since the last one -> places, as many as are free -> taken by the destination
    switch   at a step boundary: the last blocks and the tail, and the request stops

One request at a time leaves an engine. Each step moves a bounded number of blocks, so that others decode on.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.v1.request import RequestStatus

from memory_agent.kv_fingerprint import block_key, tail_key
from replicas.host_moves import HostCopy
from replicas.migration_words import Moved, PushAnswer, PushOrder

if TYPE_CHECKING:
    from vllm.v1.request import Request

IDLE_S = 15.0
"""A migration of which nothing is heard for so long is over."""


@dataclass
class _Move:
    """The migration under way.

    Attributes:
        places: of the blocks sent so far, by their number in the request; those taken have none any more.
        sent, landed: blocks sent, and confirmed by every rank, from the first on.
        target: blocks that this round is over with; None before it has begun.
        stopped: the request has left.
    """

    request_id: str
    name: str
    heard_s: float
    places: dict[int, int] = field(default_factory=dict)
    sent: int = 0
    landed: int = 0
    target: int | None = None
    stopped: bool = False
    fault: str | None = None


class KvPush:
    """Lives in the scheduler's process; not thread-safe.

    Args:
        places: of the staging memory. blocks_a_step: most blocks to copy in one step.
        fingerprint: of the KV, 32 bytes.
        origin: by which a destination finds the staging memory.
    """

    def __init__(
        self,
        block_tokens: int,
        places: int,
        blocks_a_step: int,
        fingerprint: bytes,
        origin: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._block_tokens = block_tokens
        self._free = list(range(places))
        self._most = blocks_a_step
        self._fingerprint = fingerprint
        self._origin = origin
        self._clock = clock
        self._move: _Move | None = None
        self._stores: list[HostCopy] = []
        self._release: list[int] = []

    def order(self, order: PushOrder) -> str | None:
        """Begin, go on with, or end a migration. Returns why not; None where it is done."""
        move = self._move
        if move is not None and move.name != order.move:
            if order.end:
                return None
            same = move.request_id == order.request_id
            return (
                "the request is being moved already"
                if same
                else f"the replica is moving request {move.request_id}: one leaves at a time; try again in a moment"
            )
        if order.end:
            self.end()
            return None
        if move is None:
            if order.switch or order.taken:
                return "the migration has ended"
            move = self._move = _Move(order.request_id, order.move, self._clock())
        move.heard_s, move.target = self._clock(), None
        self._give_back(move, [at for at in move.places if at < order.taken])
        return None

    def plan(self, request: "Request | None", block_ids: Sequence[int]) -> None:
        """Before vLLM schedules: send what the request has filled. Workers copy it in the coming step, before anything
        is written anew."""
        move = self._move
        if move is None or move.stopped or not _runs(request):
            return
        assert request is not None
        last = min(self._ready(request), move.sent + min(self._most, len(self._free)))
        self._send(move, request, block_ids, last)

    def answer(self, order: PushOrder, request: "Request | None") -> PushAnswer | None:
        """What to say to an order; None while its round lasts."""
        move = self._move
        if move is None or move.name != order.move:
            return PushAnswer(error="the migration has ended")
        if move.fault is not None or not _runs(request):
            why = move.fault or ("it has finished" if request is None else "it waits for memory at its replica")
            self.end()
            return PushAnswer(error=why)
        assert request is not None
        ready = self._ready(request)
        if move.target is None:
            move.target = ready
        if move.landed < move.target and (move.landed < move.sent or self._free):
            return None
        return PushAnswer(staged=move.landed, ready=ready, origin=self._origin)

    def stop(self, order: PushOrder, request: "Request | None", block_ids: Sequence[int]) -> Moved | str:
        """Send what is left of a request that is about to lose its blocks, or say why that cannot be."""
        move = self._move
        if move is None or move.name != order.move:
            return "the migration has ended"
        if move.fault is not None or not _runs(request):
            return move.fault or ("it has finished" if request is None else "it waits for memory at its replica")
        assert request is not None
        ready, computed = self._ready(request), _computed(request)
        tail = computed > ready * self._block_tokens
        if ready - move.sent + tail > len(self._free):
            return f"{ready - move.sent} KV blocks have not gone ahead: there is no room for them"
        self._send(move, request, block_ids, ready)
        last = block_key(self._fingerprint, request.block_hashes[ready - 1]) if ready else b""
        if tail:
            last = tail_key(self._fingerprint, request.request_id, computed)
            self._store(move, ready, block_ids[ready], last)
        move.stopped = True
        return Moved(self._origin, move.name, computed, last.hex())

    def take(self) -> tuple[list[int], list[HostCopy]]:
        """Places to empty and blocks to send in this step."""
        if self._move is not None and self._clock() - self._move.heard_s > IDLE_S:
            self.end()
        release, stores = self._release, self._stores
        self._release, self._stores = [], []
        return release, stores

    def landed(self, move_name: str, stores: Sequence[HostCopy], unsent: set[bytes]) -> None:
        """Every rank has answered for these of the migration ``move_name``."""
        move = self._move
        if move is None or move.name != move_name:
            return
        move.landed += len(stores)  # in the order in which they were sent
        if unsent:
            move.fault = "the staging memory takes no block: the machine's memory or its shared memory is full"

    def end(self) -> None:
        """There is no migration any more."""
        if self._move is not None:
            self._give_back(self._move, list(self._move.places))
        self._move = None

    @property
    def name(self) -> str:
        """Of the migration under way."""
        return self._move.name if self._move is not None else ""

    @property
    def request_id(self) -> str | None:
        """Of the request that is leaving."""
        return self._move.request_id if self._move is not None else None

    @property
    def busy(self) -> bool:
        """There is something for the next step to do."""
        return bool(self._stores or self._release)

    @property
    def free_places(self) -> int:
        return len(self._free)

    def _send(self, move: _Move, request: "Request", block_ids: Sequence[int], last: int) -> None:
        for at in range(move.sent, last):
            self._store(move, at, block_ids[at], block_key(self._fingerprint, request.block_hashes[at]))
        move.sent = max(move.sent, last)

    def _store(self, move: _Move, at: int, block_id: int, key: bytes) -> None:
        move.places[at] = self._free.pop()
        self._stores.append(HostCopy(move.places[at], block_id, key))

    def _ready(self, request: "Request") -> int:
        """Full blocks that are computed when the workers come to the coming step."""
        return min(len(request.block_hashes), _computed(request) // self._block_tokens)

    def _give_back(self, move: _Move, blocks: Iterable[int]) -> None:
        places = [move.places.pop(at) for at in blocks]
        self._free += places
        self._release += places
        self._stores = [copy for copy in self._stores if copy.slot not in set(places)]


def _runs(request: "Request | None") -> bool:
    return request is not None and request.status == RequestStatus.RUNNING


def _computed(request: "Request") -> int:
    """Tokens whose KV is right when the steps in flight have run, and of use: the newest token is computed anew."""
    return min(request.num_computed_tokens, request.num_tokens - 1)
