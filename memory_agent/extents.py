"""Extents: which KV blocks share which slots, computed from the engine's real KV geometry.

A lane is a row of blocks at a fixed stride. Regions are read as lanes, so that every layout is one code path:

    layer-outermost   | L0: b0 b1 b2 ... | L1: b0 b1 b2 ... | ...       a lane for each layer
    block-outermost   | b0: L0 L1 .. pad | b1: L0 L1 .. pad | ...       one lane in all

An extent is a run of blocks; its slots are those that its bytes touch, in every lane:

    lane              |  b0   b1   b2  |  b3   b4   b5  |  b6   b7   b8  |
    slots             |  s0   |   s1   |  s2   |   s3   |  s4   |   s5   |
    extents           |    extent 0    |    extent 1    |    extent 2    |

The run is the smallest one that fills whole slots. Where there is none of a sane length, neighbouring extents (and
lanes) share the slots at their borders, and whoever maps slots counts how many extents need each. Each extent is then
reckoned with the slots that it shares, so where a large chunk holds several blocks, as on a GPU, extents are long
enough for that to be little.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import gcd

from memory_agent.errors import SettingsError

MAX_RUN_BLOCKS = 64
"""Longest run of blocks that becomes one extent for the sake of filling whole slots."""
MIN_EXTENTS = 8
"""Fewest extents that such runs may leave of a cache: with fewer, nothing would ever be empty enough to shrink."""

LARGE_CHUNK_BYTES = 1 << 20
"""Chunks of at least this size, if larger than a block, make extents that share slots span SHARED_SPAN_CHUNKS."""
SHARED_SPAN_CHUNKS = 8


@dataclass(frozen=True)
class KvRegion:
    """A set of same-shaped layers: layer ``l`` of block ``b`` is the ``page_bytes`` bytes that start at
    ``offset_bytes + l * layer_stride_bytes + b * block_stride_bytes`` (the rule of vLLM's ``KVCacheTensor``).

    Regions may overlay each other: a block is used by one of them at a time.
    """

    offset_bytes: int
    layers: int
    layer_stride_bytes: int
    block_stride_bytes: int
    page_bytes: int


@dataclass(frozen=True)
class KvGeometry:
    """Where an engine's KV cache keeps its blocks, inside one allocation of ``size_bytes``.

    Raises SettingsError when a region is not made of whole, contiguous pages inside the allocation.
    """

    size_bytes: int
    num_blocks: int
    regions: tuple[KvRegion, ...]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, where no regions overlay each other."""
        return sum(region.layers * region.page_bytes for region in self.regions)

    def __post_init__(self) -> None:
        if self.num_blocks <= 0 or not self.regions:
            raise SettingsError(f"a KV cache of {self.num_blocks} blocks in {len(self.regions)} regions has no extents")
        for region in self.regions:
            if not 0 < region.page_bytes <= region.block_stride_bytes or region.layers <= 0:
                raise SettingsError(
                    f"{region}: a block's page must be contiguous and at most one block stride long; "
                    "use a KV cache layout with heads inside the block (LBHNC, BLHNC)"
                )
            last_layer = region.offset_bytes + (region.layers - 1) * region.layer_stride_bytes
            end = last_layer + (self.num_blocks - 1) * region.block_stride_bytes + region.page_bytes
            if region.offset_bytes < 0 or region.layer_stride_bytes < 0 or end > self.size_bytes:
                raise SettingsError(f"{region}: {self.num_blocks} blocks end at byte {end} of {self.size_bytes}")


@dataclass(frozen=True)
class Lane:
    """Block ``b`` is the ``width_bytes`` bytes from ``start_bytes + b * stride_bytes``; width is at most the stride."""

    start_bytes: int
    stride_bytes: int
    width_bytes: int


def lanes_of(geometry: KvGeometry) -> tuple[Lane, ...]:
    """The geometry's lanes: layers whose pages fit side by side into one block stride make one lane."""
    pages = sorted(
        (region.block_stride_bytes, region.offset_bytes + layer * region.layer_stride_bytes, region.page_bytes)
        for region in geometry.regions
        for layer in range(region.layers)
    )
    lanes: list[Lane] = []
    for stride, start, page in pages:
        if lanes and lanes[-1].stride_bytes == stride and start + page <= lanes[-1].start_bytes + stride:
            last = lanes.pop()
            lanes.append(Lane(last.start_bytes, stride, max(last.width_bytes, start + page - last.start_bytes)))
        else:
            lanes.append(Lane(start, stride, page))
    return tuple(lanes)


def choose_chunk_bytes(
    geometry: KvGeometry, granularity_bytes: int, cap_bytes: int = 4 * 1024 * 1024, floor_bytes: int = 0
) -> int:
    """The largest chunk that gives the smallest extents: few mappings, nothing committed in vain.

    Args:
        granularity_bytes: the chunk is a multiple of it.
        cap_bytes: largest chunk wanted (one granule is always allowed).
        floor_bytes: smallest chunk accepted, for a backend with few mappings: the smallest extents at that.

    Where no run of blocks fills whole chunks, about an eighth of a block: then little of an extent is shared.
    """
    lanes = lanes_of(geometry)
    cap_bytes = max(cap_bytes, floor_bytes, granularity_bytes)
    for run in range(1, _longest_run(geometry, lanes) + 1):
        common = gcd(*(lane.start_bytes for lane in lanes), *(run * lane.stride_bytes for lane in lanes))
        chunk = _largest_divisor(common, granularity_bytes, cap_bytes)
        if chunk >= max(floor_bytes, 1):
            return chunk
    eighth = min(lane.stride_bytes for lane in lanes) // 8
    wanted = max(floor_bytes, min(cap_bytes, eighth))
    return max(1, -(-wanted // granularity_bytes)) * granularity_bytes


class ExtentMap:
    """The extents of a geometry in slots of ``chunk_bytes``. Pure arithmetic: every process computes the same.

    Attributes:
        count: number of extents; the last may hold fewer blocks.
        blocks_per_extent: blocks of every other extent.
        aligned: no two extents share a slot.
        extent_bytes: bytes of the slots of one full extent; where slots are shared, the most that it can be.
    """

    def __init__(self, geometry: KvGeometry, chunk_bytes: int) -> None:
        if chunk_bytes <= 0:
            raise SettingsError(f"chunks of {chunk_bytes} bytes: at least one byte is needed")
        self.geometry = geometry
        self.chunk_bytes = chunk_bytes
        self._lanes = lanes_of(geometry)
        run = _aligned_run(geometry, self._lanes, chunk_bytes)
        self.aligned = run is not None
        self.blocks_per_extent = min(run or self._shared_run(), geometry.num_blocks)
        self.count = -(-geometry.num_blocks // self.blocks_per_extent)
        self.slots_of = lru_cache(maxsize=65536)(self._slots_of)
        self.extent_bytes = self._full_extent_slots() * chunk_bytes

    def blocks_of(self, extent: int) -> range:
        """The KV blocks of an extent. Raises IndexError for one that does not exist."""
        if not 0 <= extent < self.count:
            raise IndexError(f"extent {extent} does not exist: extents are 0 to {self.count - 1}")
        first = extent * self.blocks_per_extent
        return range(first, min(first + self.blocks_per_extent, self.geometry.num_blocks))

    def extent_of(self, block: int) -> int:
        """The extent of a KV block. Raises IndexError for one that does not exist."""
        if not 0 <= block < self.geometry.num_blocks:
            raise IndexError(f"block {block} does not exist: blocks are 0 to {self.geometry.num_blocks - 1}")
        return block // self.blocks_per_extent

    def bytes_of(self, extents: Iterable[int]) -> int:
        """Bytes that are committed when exactly these extents are: a slot that several share counts once."""
        return len({slot for extent in extents for slot in self.slots_of(extent)}) * self.chunk_bytes

    def bytes_for(self, blocks: int) -> int:
        """Bytes that so many blocks are reckoned with, in whole extents: the most that they can take."""
        return -(-blocks // self.blocks_per_extent) * self.extent_bytes

    def _slots_of(self, extent: int) -> tuple[int, ...]:
        blocks = self.blocks_of(extent)
        slots: set[int] = set()
        for lane in self._lanes:
            first_byte = lane.start_bytes + blocks[0] * lane.stride_bytes
            end_byte = lane.start_bytes + blocks[-1] * lane.stride_bytes + lane.width_bytes
            slots.update(range(first_byte // self.chunk_bytes, -(-end_byte // self.chunk_bytes)))
        return tuple(sorted(slots))

    def _shared_run(self) -> int:
        """Blocks of an extent where extents share slots."""
        chunk, stride = self.chunk_bytes, min(lane.stride_bytes for lane in self._lanes)
        least = -(-chunk // stride)
        if chunk < LARGE_CHUNK_BYTES or chunk <= stride:
            return least
        return max(least, min(-(-SHARED_SPAN_CHUNKS * chunk // stride), self.geometry.num_blocks // MIN_EXTENTS))

    def _full_extent_slots(self) -> int:
        if self.aligned:
            return len(self.slots_of(0))
        blocks, chunk = self.blocks_per_extent, self.chunk_bytes
        spans = ((blocks - 1) * lane.stride_bytes + lane.width_bytes for lane in self._lanes)
        return sum((span - 2) // chunk + 2 for span in spans)


def _longest_run(geometry: KvGeometry, lanes: tuple[Lane, ...]) -> int:
    """The longest run worth trying; 0 where lanes overlay each other at different strides, and no run can be apart."""
    before_last = geometry.num_blocks - 1
    ends = 0
    for lane in sorted(lanes, key=lambda lane: lane.start_bytes):
        if lane.start_bytes < ends:
            return 0
        ends = lane.start_bytes + before_last * lane.stride_bytes + lane.width_bytes
    return max(1, min(MAX_RUN_BLOCKS, geometry.num_blocks // MIN_EXTENTS))


def _aligned_run(geometry: KvGeometry, lanes: tuple[Lane, ...], chunk_bytes: int) -> int | None:
    """The smallest run of blocks that fills whole chunks in every lane; None where there is none of a sane length."""
    if any(lane.start_bytes % chunk_bytes for lane in lanes):
        return None
    runs = range(1, _longest_run(geometry, lanes) + 1)
    return next((run for run in runs if all(run * lane.stride_bytes % chunk_bytes == 0 for lane in lanes)), None)


def _largest_divisor(number: int, multiple_of: int, cap: int) -> int:
    """The largest divisor of ``number`` up to ``cap`` that is a multiple of ``multiple_of``; 0 where there is none."""
    if number % multiple_of:
        return 0
    granules = number // multiple_of
    first = -(-number // cap)
    return next((number // parts for parts in range(first, granules + 1) if granules % parts == 0), 0)
