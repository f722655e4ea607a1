"""The bytes of KV blocks, for whoever copies them: in place on a host, through a pinned buffer on a GPU."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from memory_agent.extents import KvGeometry
from memory_agent.host_segment import Part


class KvBlocks(Protocol):
    """Blocks whose extents are mapped. A block's parts are those of its regions, each of shape (layers, page bytes);
    they are good until the next call."""

    def fetch(self, block_id: int) -> Sequence[Part]:
        """What the block holds when all that is queued on the device is done."""
        ...

    def room(self, block_id: int) -> Sequence[Part]:
        """Where new content of the block is to be written; ``put`` has to follow."""
        ...

    def put(self, block_id: int) -> None:
        """Make what was written to the block's room its content: for all that is queued on the device from now on."""
        ...


class HostBlocks:
    """Blocks in host memory: their parts are the memory itself.

    Args:
        memory: the KV tensor's bytes.
    """

    def __init__(self, memory: NDArray[np.uint8], geometry: KvGeometry) -> None:
        self._pages = [
            np.lib.stride_tricks.as_strided(
                memory[region.offset_bytes :],
                (region.layers, geometry.num_blocks, region.page_bytes),
                (region.layer_stride_bytes, region.block_stride_bytes, 1),
            )
            for region in geometry.regions
        ]

    def fetch(self, block_id: int) -> list[NDArray[np.uint8]]:
        return [pages[:, block_id] for pages in self._pages]

    room = fetch

    def put(self, block_id: int) -> None:
        """It is there already."""


class StagedBlocks:
    """Blocks in a GPU's memory: one at a time is copied through a pinned buffer, in the order of the calling thread's
    current stream, which is the one that computes.

    The buffer is one of its own and not the host buffer's segment: pinned, that would hold all its memory from the
    start, where its slots are committed and punched out one by one.

    Args:
        memory: the KV tensor, one-dimensional, int8.
    """

    def __init__(self, memory: torch.Tensor, geometry: KvGeometry) -> None:
        self._device = memory.device
        raw = memory.view(torch.uint8)
        self._pages = [
            raw.as_strided(
                (region.layers, geometry.num_blocks, region.page_bytes),
                (region.layer_stride_bytes, region.block_stride_bytes, 1),
                region.offset_bytes,
            )
            for region in geometry.regions
        ]
        self._staged = [
            torch.empty((region.layers, region.page_bytes), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            for region in geometry.regions
        ]
        self._parts = [staged.numpy() for staged in self._staged]

    def fetch(self, block_id: int) -> list[NDArray[np.uint8]]:
        for pages, staged in zip(self._pages, self._staged, strict=True):
            for layer, page in enumerate(staged):  # contiguous pieces: a strided copy would take memory of the device
                page.copy_(pages[layer, block_id], non_blocking=True)
        self._wait()
        return self._parts

    def room(self, block_id: int) -> list[NDArray[np.uint8]]:
        return self._parts

    def put(self, block_id: int) -> None:
        for pages, staged in zip(self._pages, self._staged, strict=True):
            for layer, page in enumerate(staged):
                pages[layer, block_id].copy_(page, non_blocking=True)
        self._wait()

    def _wait(self) -> None:
        """Until the copies are done: the buffer is about to be read, or used again."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
