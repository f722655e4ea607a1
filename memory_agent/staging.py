"""Where the KV blocks of requests that leave their engine lie: host segments beside the lease board, one a rank.

    <board>-moving<row>-<rank>       of the engine in that row, which writes it
    <board>-mirror-<move>-<rank>     of an engine on another node, as far as it has come; the memory agent writes it

What others name is a path without its rank, the origin. An agent reads and writes no other file for them.
"""

import re
from pathlib import Path

from memory_agent.errors import MemoryError_
from memory_agent.host_segment import host_segment_path

_MOVE = re.compile(r"[0-9a-f]{32}")


class StagingError(MemoryError_):
    """What is named is no staging memory of this node."""


def staging_origin(board: Path, row: int) -> Path:
    """Of the engine in ``row``."""
    return board.with_name(f"{board.stem}-moving{row}")


def mirror_origin(board: Path, move: str) -> Path:
    """Of the migration ``move``. Raises StagingError where that is no migration's name, 32 hexadecimal digits."""
    if _MOVE.fullmatch(move) is None:
        raise StagingError(f"{move!r} is no migration's name")
    return board.with_name(f"{_mirrors(board)}{move}")


def known_origin(board: Path, origin: str) -> Path:
    """``origin`` as an engine beside ``board`` may have it. Raises StagingError for any other."""
    path = Path(origin)
    row = path.name.removeprefix(f"{board.stem}-moving")
    if not re.fullmatch(r"[0-9]{1,6}", row) or str(staging_origin(board, int(row))) != origin:
        raise StagingError(f"{origin!r} is no staging memory beside {board}")
    return path


def segment_path(origin: Path, rank: int) -> Path:
    """The segment of one rank."""
    return origin.with_name(f"{origin.name}-{rank}")


def segments_of(board: Path, row: int, rank: int) -> list[Path]:
    """All that worker ``rank`` of the engine in ``row`` may have, its host buffer too, and leaves where it is
    killed."""
    return [host_segment_path(board, row, rank), segment_path(staging_origin(board, row), rank)]


def remove_mirrors(board: Path) -> None:
    """Those that an agent before has left."""
    for path in board.parent.iterdir():
        if path.name.startswith(_mirrors(board)):
            path.unlink(missing_ok=True)


def _mirrors(board: Path) -> str:
    return f"{board.stem}-mirror-"
