"""A shortage of memory in one worker of an engine, switched on and off from a test.

vLLM adds this class to its workers (``worker_extension_cls``), and ``collective_rpc`` calls its method in all of them.
"""

import ctypes
import errno
from typing import Any

from memory_agent import host_vmm


class MemoryShortage:
    """See the module."""

    rank: int

    def set_memory_shortage(self, rank: int, chunks_left: int | None) -> None:
        """In the worker of ``rank`` the operating system commits ``chunks_left`` more chunks and then refuses; None
        ends the shortage. Giving memory back always works."""
        if self.rank != rank:
            return
        commit = host_vmm._libc.fallocate
        left = chunks_left

        def refuse(fd: int, mode: int, offset: int, size_bytes: int) -> int:
            nonlocal left
            if left is not None and mode == 0:
                left -= 1
                if left < 0:
                    ctypes.set_errno(errno.ENOSPC)
                    return -1
            answer: int = commit(fd, mode, offset, size_bytes)
            return answer

        replaced: Any = commit if chunks_left is None else refuse
        host_vmm._fallocate = replaced
