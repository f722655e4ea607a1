"""What a worker's steps take of its GPU, measured in chunks. For engines that compute on an NVIDIA GPU.

    step ends    torch's pool keeps the segments of its tensors: |--- tensors that stay ---|------- kept -------|
                                                                 |<------ floor ---------->|
    next step    not larger than those since the last trim: it finds there what it needs
                 larger, or charged for less than is kept: the pool is trimmed first

Every tensor of a step, sampling included, lies in chunks of the pool that the KV cache uses too. CUDA graphs have their
own memory, from before the first step: it stays, and is none of this.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from memory_agent.chunks import ChunkPool
from memory_agent.cuda_allocator import CudaAllocator
from memory_agent.errors import OutOfDeviceMemory
from replicas.activation_ledger import ActivationSample

logger = logging.getLogger(__name__)


class CudaMeter:
    """The StepMeter of a GPU. Its ``step`` is to be around each step that was started, and around nothing else.

    Args:
        allocator: where steps are charged for what they take, torch's way to ``pool``; None where they are not: their
            tensors then come from torch's own pool, and nothing is measured.
        pool: of the KV cache.
    """

    def __init__(self, allocator: CudaAllocator | None, pool: ChunkPool) -> None:
        self._allocator = allocator
        self._pool = pool
        self._floor_bytes = 0
        self._keep_bytes = 0
        self._tokens = self._rows = 0
        self._largest = (0, 0)  # tokens and rows of the steps since the last trim
        self._clean = self._first = True

    @contextmanager
    def step(self) -> Iterator[None]:
        """What is allocated on the device meanwhile belongs to the step. Raises what ``activation_pool`` does."""
        if self._allocator is None:
            yield
            return
        with self._allocator.activation_pool():
            yield

    def finish_step(self, keep_bytes: int = 0) -> list[ActivationSample]:
        tokens, self._tokens = self._tokens, 0
        self._keep_bytes = keep_bytes
        if self._allocator is None or not tokens:
            return []
        if self._first:  # libraries allocate what they keep for good: it would count as the step's
            self._first = False
            self._trim()
            return []
        return [ActivationSample(tokens, self._rows, self._held_bytes if self._clean else None, self._held_bytes)]

    def make_room(self, tokens: int, rows: int, step_bytes: int) -> None:
        larger = tokens > self._largest[0] or rows > self._largest[1]
        if self._held_bytes > self._keep_bytes + (0 if larger else step_bytes):
            self._trim()
        self._clean = not self._held_bytes  # vLLM allocates a step's inputs before it calls start_step

    def rest(self) -> None:
        if self._allocator is None:
            torch.cuda.empty_cache()
        else:
            self._trim()
            self._clean = True

    def start_step(self, tokens: int, rows: int) -> None:
        if not tokens:
            return
        self._tokens, self._rows = tokens, rows
        self._largest = (max(tokens, self._largest[0]), max(rows, self._largest[1]))

    @property
    def _held_bytes(self) -> int:
        """Committed for steps, beyond tensors that have outlived them."""
        committed = self._allocator.segments.committed_bytes if self._allocator is not None else 0
        return max(0, committed - self._floor_bytes)

    def _trim(self) -> None:
        """Back to the driver, so that whoever the lease gives it to can have it."""
        assert self._allocator is not None
        self._allocator.trim()
        try:
            self._pool.trim()
        except OutOfDeviceMemory as error:
            logger.warning("activations are kept until the next trim: %s", error)
        self._floor_bytes = self._allocator.segments.committed_bytes
        self._largest = (0, 0)
