"""What is checked before anything is started."""

import os
from pathlib import Path

import pytest

from cluster.device import HOST
from cluster.preflight import check_host_memory, check_shared_memory
from memory_agent.errors import SettingsError


def test_host_buffers_beyond_shared_memory_are_refused_with_the_numbers(tmp_path: Path) -> None:
    """What is free fits, a block more does not, and the message says what there is and what to do."""
    system = os.statvfs(tmp_path)
    free_bytes = system.f_bavail * system.f_frsize
    check_shared_memory(free_bytes // 2, tmp_path)
    with pytest.raises(SettingsError, match=r"lower memory\.host_buffer, or give .* \(--shm-size\)") as refused:
        check_shared_memory(2 * free_bytes, tmp_path)
    assert f"take {2 * free_bytes >> 20} MiB, but {tmp_path} has" in str(refused.value)


def test_a_cluster_on_a_gpu_needs_host_memory_too() -> None:
    """For Ray, the API, the engines' processes and their host buffers; the message has the numbers."""
    needed = HOST.base_bytes + 2 * HOST.replica_bytes + (4 << 30)
    check_host_memory(2, 4 << 30, needed)
    with pytest.raises(
        SettingsError, match=rf"{needed >> 20} MiB are needed .* 2 replicas .* lower memory\.host_buffer"
    ):
        check_host_memory(2, 4 << 30, needed - 1)
