"""Carries staged KV blocks between nodes: each node's memory agent has one courier.

    source's agent    staged(origin, rank, known) --a chunk of blocks--> fetch(source, origin, move)    destination's
    <board>-moving<row>-<rank>                                           <board>-mirror-<move>-<rank>

A mirror has the places of its segment, so an engine finds a block that has crossed as it finds one of its own node, and
checks it by the checksum that the source's engine gave it. While one chunk is written the next is on its way, and no
more. A mirror ends with its migration, when nothing is heard of that for long, and with its agent.
"""

import asyncio
import atexit
import time
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

from memory_agent.errors import MemoryError_
from memory_agent.mirror import Mirror, Staged, read_staged
from memory_agent.staging import known_origin, mirror_origin, remove_mirrors
from memory_agent.token_bucket import TokenBucket

CHUNK_BYTES = 8 << 20
"""Of blocks in one answer."""
MIRROR_IDLE_S = 30.0
MIRRORS_MOST = 4
WAIT_MOST_S = 0.5
_LOOK_S = 0.002
_PERIOD_S = 2.0

Ask = Callable[[str, str, int, list[bytes], float], Awaitable[Staged]]
"""Calls ``staged`` of the agent named first. What it raises ends the fetch."""


class CourierError(MemoryError_):
    """The blocks have not come."""


class Courier:
    """Belongs to its event loop; files are read and written in threads.

    Args:
        board: the lease board of this node's device.
        bytes_s: most bytes a second that are fetched, by all together; None for no bound.
    """

    def __init__(self, board: Path, ask: Ask, bytes_s: int | None = None) -> None:
        self._board = board
        self._ask = ask
        self._bucket = TokenBucket(bytes_s)
        self._mirrors: dict[str, Mirror] = {}
        remove_mirrors(board)
        atexit.register(self.close)

    async def staged(self, origin: str, rank: int, known: Collection[bytes], wait_s: float = 0.0) -> Staged:
        """Whole blocks of the staging memory at ``origin`` that the caller does not know, a chunk of them; where there
        are none, those that come within ``wait_s``. Raises StagingError for what is no staging memory of this node."""
        path, keys = known_origin(self._board, origin), frozenset(known)
        until_s = time.monotonic() + min(wait_s, WAIT_MOST_S)
        while True:
            found = await asyncio.to_thread(read_staged, path, rank, keys, CHUNK_BYTES)
            if found.blocks or time.monotonic() >= until_s:
                return found
            await asyncio.sleep(_LOOK_S)

    async def fetch(self, source: str, origin: str, move: str, until: bytes = b"", within_s: float = 10.0) -> str:
        """Bring what is staged at ``origin`` of the agent ``source`` to this node. Returns where engines here find it.

        Args:
            move: the migration that it is of. until: key of a block that is among it, or will be in a moment.

        Raises CourierError, StagingError, and what a call to the agent raises.
        """
        mirror = self._mirror(move)
        try:
            async with asyncio.timeout(within_s):
                ranks, rank = 1, 0
                while rank < ranks:
                    ranks = await self._pull(mirror, source, origin, rank, until)
                    rank += 1
        except TimeoutError:
            raise CourierError(f"what {source} has staged has not come within {within_s:g} s") from None
        return str(mirror.origin)

    async def forget(self, move: str) -> None:
        """The migration has ended."""
        if (mirror := self._mirrors.pop(move, None)) is not None:
            await asyncio.to_thread(mirror.close)

    async def run(self) -> None:
        """Remove mirrors of which nothing is heard any more, for ever."""
        while True:
            await asyncio.sleep(_PERIOD_S)
            idle = time.monotonic() - MIRROR_IDLE_S
            for move in [move for move, mirror in self._mirrors.items() if mirror.used_s < idle]:
                await self.forget(move)

    def close(self) -> None:
        """Remove all mirrors."""
        atexit.unregister(self.close)
        while self._mirrors:
            self._mirrors.popitem()[1].close()

    def _mirror(self, move: str) -> Mirror:
        if move not in self._mirrors:
            if len(self._mirrors) >= MIRRORS_MOST:
                raise CourierError(f"{MIRRORS_MOST} requests are on their way to this node already")
            self._mirrors[move] = Mirror(mirror_origin(self._board, move))
        self._mirrors[move].used_s = time.monotonic()
        return self._mirrors[move]

    async def _pull(self, mirror: Mirror, source: str, origin: str, rank: int, until: bytes) -> int:
        """Until the rank has all that is staged, ``until`` among it. Returns how many ranks there are."""
        known, coming = await asyncio.to_thread(mirror.keys, rank), Staged()
        while True:
            known |= {block.stored.key for block in coming.blocks}
            waits = until and until not in known
            asked = self._ask(source, origin, rank, list(known), WAIT_MOST_S if waits else 0.0)
            came, damaged = await asyncio.gather(asked, asyncio.to_thread(mirror.put, rank, coming))
            mirror.used_s = time.monotonic()
            known -= damaged
            if not came.blocks and not damaged and not waits:
                return came.ranks
            coming = came
            await asyncio.sleep(self._bucket.take(came.payload.nbytes))
