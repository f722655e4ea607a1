"""Loads of KV blocks that are believed before all ranks have confirmed them, and who has computed with them meanwhile.

What is computed from one that then turns out not whole is forgotten everywhere: in requests that run, that were
preempted meanwhile, and that ended meanwhile.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass
class _Doubt:
    """A request has lost these blocks, of which those ``awaited`` have a load that is not confirmed. ``request_id``:
    None where the request has ended."""

    request_id: str | None
    block_ids: list[int]
    awaited: set[int]


class LoadDoubts:
    """Lives in the scheduler's process; not thread-safe.

    Args:
        loading: the device blocks with a load that is not confirmed.
        disbelieve: makes sure that nobody finds what these device blocks hold.
    """

    def __init__(self, loading: Callable[[], set[int]], disbelieve: Callable[[Sequence[int]], None]) -> None:
        self._loading = loading
        self._disbelieve = disbelieve
        self._doubts: list[_Doubt] = []

    def __bool__(self) -> bool:
        return bool(self._doubts)

    def lose(self, request_id: str | None, block_ids: Sequence[int]) -> None:
        """The request, or one that has ended, is about to lose these blocks."""
        awaited = self._loading().intersection(block_ids)
        if awaited:
            self._doubts.append(_Doubt(request_id, list(block_ids), awaited))

    def ended(self, request_id: str) -> None:
        """Nobody waits for this request any more."""
        for doubt in self._doubts:
            doubt.request_id = None if doubt.request_id == request_id else doubt.request_id

    def landed(self, block_ids: set[int]) -> None:
        """Every rank has answered for the loads into these blocks."""
        for doubt in self._doubts:
            doubt.awaited -= block_ids
        self._doubts = [doubt for doubt in self._doubts if doubt.awaited]

    def fail(self, invalid_block_ids: set[int], running: Mapping[str, Sequence[int]]) -> list[str]:
        """These device blocks could not be loaded. Call it before anything else is done about the step that failed.

        running: blocks of every running request.

        Returns the requests that have computed with them, running or preempted since: they have to start again, and
        their output in flight is to be dropped.
        """
        wrong = []
        tables = [(doubt.request_id, doubt.block_ids) for doubt in self._doubts]
        for request_id, block_ids in (*tables, *running.items()):
            at = next((at for at, block_id in enumerate(block_ids) if block_id in invalid_block_ids), None)
            if at is None:
                continue
            self._disbelieve(block_ids[at:])
            if request_id is not None:
                wrong.append(request_id)
        return wrong
