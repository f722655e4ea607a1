"""How much memory this host can still give to a new cluster."""

from pathlib import Path

import psutil

_CGROUP_V2 = Path("/sys/fs/cgroup")
_CGROUP_V1 = Path("/sys/fs/cgroup/memory")


def free_memory_bytes(root_v2: Path = _CGROUP_V2, root_v1: Path = _CGROUP_V1) -> int:
    """Bytes that new processes can take: what the host has available, and no more than the container's limit leaves."""
    free = int(psutil.virtual_memory().available)
    for root, limit_name, used_name, cache_name in (
        (root_v2, "memory.max", "memory.current", "inactive_file"),
        (root_v1, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, used = _number(root / limit_name), _number(root / used_name)
        if limit is not None and used is not None:
            # Page cache counts as used, but the kernel drops it before it refuses memory.
            free = min(free, max(0, limit - used + _stat(root / "memory.stat", cache_name)))
    return free


def _number(path: Path) -> int | None:
    """The file's number; None where there is no such file or it says "max"."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _stat(path: Path, key: str) -> int:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(value) for name, value in (line.split() for line in lines) if name == key), 0)
