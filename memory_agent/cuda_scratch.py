"""A scratch chunk behind every slot of a range that has no chunk of its own.

    backed range   | chunk | scratch | scratch | chunk | scratch ...      one scratch chunk, mapped many times

vLLM's kernels may touch any block of a KV cache that they believe to be all there: in its warm-up, or past the end of a
sequence. There they find memory that is nobody's, where an address without any would end the process. Mapping one
allocation several times is CUDA's virtual aliasing.
"""

import logging
from collections.abc import Callable

from memory_agent.cuda_driver import CudaDriver, CudaError
from memory_agent.errors import OutOfDeviceMemory
from memory_agent.vmm import ChunkHandle

logger = logging.getLogger(__name__)


class Scratch:
    """Used by the backend that owns the range, with its context current.

    Args:
        chunk: of one slot, zeroed; slots: addresses of all slots.
        map_chunk: puts the chunk behind an address.
    """

    def __init__(
        self, driver: CudaDriver, chunk: ChunkHandle, slots: range, map_chunk: Callable[[int, ChunkHandle], None]
    ) -> None:
        self.chunk = chunk
        self.slots = slots
        self._driver = driver
        self._map = map_chunk
        self._showing: set[int] = set()
        self._holes: set[int] = set()  # slots that have nothing, because the driver refused

    def show(self, address: int) -> None:
        """Put it behind a slot that has nothing. Other addresses are passed over. Raises what mapping raises."""
        if address in self.slots and address not in self._showing:
            self._map(address, self.chunk)
            self._showing.add(address)

    def show_again(self, address: int) -> None:
        """As ``show``, where a chunk was. If the driver refuses, the slot has no memory, as in other ranges, until the
        next such call, which tries it again."""
        self._holes.add(address)
        for hole in sorted(self._holes):
            try:
                self.show(hole)
            except (CudaError, OutOfDeviceMemory) as error:
                logger.warning("nothing is behind the addresses from %#x: %s", hole, error)
            else:
                self._holes.discard(hole)

    def hide(self, address: int) -> None:
        """Take it from a slot that shows it, when the device has done all that was queued, to put a chunk there. Raises
        CudaError; it is still shown then."""
        self._holes.discard(address)
        if address in self._showing:
            self._driver.call("cuCtxSynchronize")
            self._driver.call("cuMemUnmap", address, self.chunk.size_bytes)
            self._showing.discard(address)

    def close(self) -> None:
        """Take it from all slots and release it. Nothing that is queued may touch them."""
        for address in self._showing:
            self._driver.quietly("cuMemUnmap", address, self.chunk.size_bytes)
        self._driver.quietly("cuMemRelease", self.chunk.id)
        self._showing.clear()
        self.slots = range(0)
