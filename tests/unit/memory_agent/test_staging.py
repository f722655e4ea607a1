"""Which files are staging memory. Whatever else is named is refused."""

import os
from pathlib import Path

import pytest

from memory_agent.host_segment import HostSegment, SegmentError
from memory_agent.staging import (
    StagingError,
    known_origin,
    mirror_origin,
    remove_mirrors,
    segment_path,
    staging_origin,
)

BOARD = Path("/dev/shm/ellm-c1-cpu.board")
MOVE = "0123456789abcdef" * 2


def test_an_engine_s_own_origin_is_known() -> None:
    for row in (0, 7, 4095):
        assert known_origin(BOARD, str(staging_origin(BOARD, row))) == staging_origin(BOARD, row)


@pytest.mark.parametrize(
    "origin",
    [
        "",
        "/etc/passwd",
        "/dev/shm/ellm-c1-cpu.board",
        "/dev/shm/ellm-c1-cpu-host0",
        "/dev/shm/ellm-c1-cpu-moving",
        "/dev/shm/ellm-c1-cpu-moving0-0",
        "/dev/shm/ellm-c1-cpu-moving00",
        "/dev/shm/ellm-c1-cpu-moving-1",
        "/dev/shm/ellm-c1-cpu-moving0\n",
        "/dev/shm/ellm-c1-cpu-moving٣",
        "/dev/shm/ellm-c2-cpu-moving0",
        "/tmp/ellm-c1-cpu-moving0",
        "ellm-c1-cpu-moving0",
        "/dev/shm/../shm/ellm-c1-cpu-moving0",
        "/dev/shm//ellm-c1-cpu-moving0",
        "/dev/shm/ellm-c1-cpu-moving0/",
        "/dev/shm/ellm-c1-cpu-moving0/../ellm-c1-cpu.board",
        "/dev/shm/ellm-c1-cpu-moving0\0",
        f"/dev/shm/ellm-c1-cpu-mirror-{MOVE}",
    ],
)
def test_anything_else_is_no_origin(origin: str) -> None:
    with pytest.raises(StagingError):
        known_origin(BOARD, origin)


@pytest.mark.parametrize("move", ["", "m", MOVE.upper(), f"../{MOVE}"[:32], f"{MOVE}0", f"{MOVE}\n"])
def test_a_mirror_is_of_a_migration(move: str) -> None:
    assert mirror_origin(BOARD, MOVE).parent == BOARD.parent
    with pytest.raises(StagingError):
        mirror_origin(BOARD, move)


def test_a_link_in_a_segment_s_place_is_not_followed(tmp_path: Path) -> None:
    real, link = tmp_path / "elsewhere", segment_path(staging_origin(tmp_path / "b.board", 0), 0)
    HostSegment.create(real, 64, 2, b"f" * 32).close()
    os.symlink(real, link)
    with pytest.raises(SegmentError):
        HostSegment.open(link)


def test_only_mirrors_of_this_board_are_removed(tmp_path: Path) -> None:
    board = tmp_path / "b.board"
    kept = {"b.board", "b-moving0-0", "b-host0-0", "c-mirror-x-0"}
    for name in kept | {f"b-mirror-{MOVE}-0", f"b-mirror-{MOVE}-1"}:
        (tmp_path / name).touch()
    remove_mirrors(board)
    assert {path.name for path in tmp_path.iterdir()} == kept
