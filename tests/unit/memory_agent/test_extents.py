"""Extents: from KV geometries to slots, checked against the byte-by-byte rule of the geometry."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from memory_agent.errors import SettingsError
from memory_agent.extents import ExtentMap, KvGeometry, KvRegion, choose_chunk_bytes

KIB = 1024
MIB = 1024 * KIB


def layer_outermost(layers: int, page: int, blocks: int) -> KvGeometry:
    """One group; each layer a contiguous region, as vLLM lays out LBHNC."""
    return KvGeometry(layers * page * blocks, blocks, (KvRegion(0, layers, page * blocks, page, page),))


def block_outermost(layers: int, page: int, blocks: int, pad: int = 0) -> KvGeometry:
    """One group; each block a row of all layers' pages."""
    stride = layers * page + pad
    return KvGeometry(stride * blocks, blocks, (KvRegion(0, layers, page, stride, page),))


def page_slots(geometry: KvGeometry, block: int, chunk: int) -> set[int]:
    """The slots of a block by the rule itself: offset + layer * layer_stride + block * block_stride."""
    slots: set[int] = set()
    for region in geometry.regions:
        for layer in range(region.layers):
            start = region.offset_bytes + layer * region.layer_stride_bytes + block * region.block_stride_bytes
            slots.update(range(start // chunk, (start + region.page_bytes - 1) // chunk + 1))
    return slots


@pytest.mark.parametrize(("page", "blocks"), [(98304, 729), (196608, 364)])
def test_smollm2_layer_outermost_has_extents_of_one_block(page: int, blocks: int) -> None:
    """30 layers of pages that are whole granules: one chunk is one page, one extent one block, 30 slots apart."""
    geometry = layer_outermost(30, page, blocks)
    chunk = choose_chunk_bytes(geometry, 4096)
    extents = ExtentMap(geometry, chunk)
    assert chunk == page
    assert (extents.blocks_per_extent, extents.count, extents.aligned) == (1, blocks, True)
    assert extents.extent_bytes == 30 * page
    assert extents.slots_of(5) == tuple(layer * blocks + 5 for layer in range(30))
    assert extents.extent_of(blocks - 1) == blocks - 1


def test_an_8b_model_block_outermost_has_one_chunk_a_block() -> None:
    """32 layers of 64 KiB make a block of 2 MiB: on a granularity of 2 MiB that is one chunk and one slot."""
    geometry = block_outermost(32, 64 * KIB, 100)
    assert choose_chunk_bytes(geometry, 2 * MIB) == 2 * MIB
    extents = ExtentMap(geometry, 2 * MIB)
    assert (extents.blocks_per_extent, extents.count, extents.extent_bytes) == (1, 100, 2 * MIB)
    assert extents.slots_of(42) == (42,)


def test_pages_that_do_not_divide_the_granule_form_runs() -> None:
    """Pages of 96 KiB on granules of 128 KiB: 4 blocks fill 3 granules, so runs of 4 blocks share no slot."""
    geometry = layer_outermost(3, 96 * KIB, 64)
    chunk = choose_chunk_bytes(geometry, 128 * KIB)
    extents = ExtentMap(geometry, chunk)
    assert (extents.blocks_per_extent, extents.count, extents.aligned) == (4, 16, True)
    assert chunk == 3 * 128 * KIB
    assert extents.extent_bytes == 3 * 4 * 96 * KIB
    assert list(extents.blocks_of(1)) == [4, 5, 6, 7]


def test_a_layer_that_starts_inside_a_granule_makes_neighbours_share() -> None:
    """With 65 such blocks a layer is no whole number of granules: no run can be apart, and borders are shared."""
    geometry = layer_outermost(3, 96 * KIB, 65)
    extents = ExtentMap(geometry, choose_chunk_bytes(geometry, 128 * KIB))
    assert not extents.aligned
    assert set(extents.slots_of(0)) & set(extents.slots_of(1))
    all_slots = -(-geometry.size_bytes // extents.chunk_bytes)
    assert extents.bytes_of(range(extents.count)) == all_slots * extents.chunk_bytes


def test_a_run_that_would_leave_few_extents_is_not_used() -> None:
    """Where only a very long run would fill whole chunks, the cache keeps short extents that share slots instead."""
    geometry = layer_outermost(2, 4096 + 64, 500)
    extents = ExtentMap(geometry, choose_chunk_bytes(geometry, 4096))
    assert not extents.aligned
    assert extents.count == 500
    assert not ExtentMap(layer_outermost(2, 96 * KIB, 16), 3 * 128 * KIB).aligned  # runs of 4 would leave 4 extents


def test_small_blocks_in_large_chunks_are_reckoned_with_little_more_than_they_take() -> None:
    """Blocks of 360 KiB on a granularity of 2 MiB share chunks: extents are long, so that what they share is little of
    them, unless that would leave too few."""
    extents = ExtentMap(block_outermost(30, 12 * KIB, 4000), 2 * MIB)
    assert not extents.aligned
    blocks_bytes = extents.blocks_per_extent * 360 * KIB
    assert blocks_bytes <= extents.extent_bytes <= 1.25 * blocks_bytes
    assert ExtentMap(block_outermost(30, 12 * KIB, 80), 2 * MIB).count >= 8


def test_two_groups_that_overlay_each_other_are_one_set_of_extents() -> None:
    """Two cache groups over the same blocks (block-outermost, different packings) take each block's slots once."""
    page, blocks = 64 * KIB, 20
    stride = 6 * page
    geometry = KvGeometry(
        stride * blocks,
        blocks,
        (
            KvRegion(0, 6, page, stride, page),
            KvRegion(0, 2, page, stride, page),
            KvRegion(2 * page, 1, 2 * page, stride, 2 * page),
        ),
    )
    extents = ExtentMap(geometry, choose_chunk_bytes(geometry, 4096))
    assert (extents.blocks_per_extent, extents.aligned, extents.extent_bytes) == (1, True, stride)
    assert extents.slots_of(3) == (3,)


def test_layer_outermost_groups_overlay_page_by_page() -> None:
    """Two layer-outermost groups of equal pages alias from byte 0, and an extent holds the larger group's slots."""
    page, blocks = 8192, 32
    geometry = KvGeometry(
        4 * page * blocks,
        blocks,
        (KvRegion(0, 4, page * blocks, page, page), KvRegion(0, 3, page * blocks, page, page)),
    )
    extents = ExtentMap(geometry, choose_chunk_bytes(geometry, 4096))
    assert extents.aligned
    assert extents.slots_of(7) == (7, 39, 71, 103)


def test_overlays_of_different_strides_are_never_called_aligned() -> None:
    """Where block 1 of one group lies under block 2 of the other, extents share slots and say so."""
    geometry = KvGeometry(8192 * 32, 32, (KvRegion(0, 1, 8192 * 32, 8192, 8192), KvRegion(0, 2, 4096 * 32, 4096, 4096)))
    extents = ExtentMap(geometry, choose_chunk_bytes(geometry, 4096))
    assert not extents.aligned


def test_a_padded_block_belongs_to_its_extent_whole() -> None:
    """The pad at a block's end makes the block a whole number of granules, and costs no neighbour."""
    geometry = block_outermost(3, 1000, 64, pad=1096)
    extents = ExtentMap(geometry, choose_chunk_bytes(geometry, 4096))
    assert (extents.aligned, extents.blocks_per_extent, extents.extent_bytes) == (True, 1, 4096)


def test_the_cap_splits_a_block_into_equal_chunks() -> None:
    """A block above the cap is divided evenly, so that its extent stays one block."""
    geometry = block_outermost(80, 128 * KIB, 40)
    chunk = choose_chunk_bytes(geometry, 4096, cap_bytes=4 * MIB)
    assert chunk == 10 * MIB // 4
    assert ExtentMap(geometry, chunk).blocks_per_extent == 1


def test_the_floor_makes_extents_longer() -> None:
    """A backend with few mappings asks for larger chunks and gets the smallest extents that have them."""
    geometry = layer_outermost(4, 16 * KIB, 256)
    chunk = choose_chunk_bytes(geometry, 4096, floor_bytes=50_000)
    assert chunk == 64 * KIB
    assert ExtentMap(geometry, chunk).blocks_per_extent == 4


@pytest.mark.parametrize(
    "region",
    [
        KvRegion(0, 2, 4096 * 16, 1024, 4096),  # heads outside blocks: a page is scattered
        KvRegion(0, 0, 0, 4096, 4096),
        KvRegion(-4096, 1, 0, 4096, 4096),
        KvRegion(0, 3, 4096 * 16, 4096, 4096),  # a layer too many for the allocation
    ],
)
def test_geometries_that_cannot_be_elastic_are_refused(region: KvRegion) -> None:
    """Scattered pages, empty regions and regions outside the allocation are settings errors."""
    with pytest.raises(SettingsError):
        KvGeometry(2 * 4096 * 16, 16, (region,))


def test_blocks_and_extents_outside_are_refused() -> None:
    """An extent or block that does not exist raises IndexError, negative ones too."""
    extents = ExtentMap(layer_outermost(2, 4096, 16), 4096)
    for call in (extents.blocks_of, extents.slots_of, extents.extent_of):
        for index in (-1, 16):
            with pytest.raises(IndexError):
                call(index)


@st.composite
def geometries(draw: st.DrawFn) -> KvGeometry:
    """Layer- and block-outermost geometries of one to three groups that overlay each other, with pads, offsets and
    pages of any size; block-outermost groups may pack their blocks differently."""
    layers, blocks = draw(st.integers(1, 5)), draw(st.integers(1, 70))
    page = draw(st.one_of(st.integers(1, 12).map(lambda n: n * 512), st.integers(1, 5000)))
    offset = draw(st.sampled_from([0, 0, 0, 1024, 4096, 100]))
    others = draw(st.lists(st.integers(1, layers), max_size=2))
    if draw(st.booleans()):
        regions = [KvRegion(offset, count, page * blocks, page, page) for count in (layers, *others)]
        return KvGeometry(offset + layers * page * blocks, blocks, tuple(regions))
    stride = layers * page + draw(st.sampled_from([0, 512, 4096, 33]))
    regions = [KvRegion(offset, layers, page, stride, page)]
    for count in others:
        first = draw(st.integers(0, layers - count))
        regions.append(KvRegion(offset + first * page, 1, stride, stride, count * page))
    return KvGeometry(offset + stride * blocks, blocks, tuple(regions))


@settings(max_examples=300, deadline=None)
@given(geometries(), st.sampled_from([512, 1024, 4096]), st.integers(1, 64 * KIB))
def test_extents_hold_exactly_the_slots_of_their_blocks(geometry: KvGeometry, granule: int, cap: int) -> None:
    """For any geometry: extents partition the blocks, and their slots are those of their pages (and pads between)."""
    chunk = choose_chunk_bytes(geometry, granule, cap)
    assert chunk % granule == 0 and chunk <= max(cap + granule, granule)
    extents = ExtentMap(geometry, chunk)
    seen: list[int] = []
    for extent in range(extents.count):
        blocks, slots = extents.blocks_of(extent), set(extents.slots_of(extent))
        seen += blocks
        assert all(extents.extent_of(block) == extent for block in blocks)
        needed = set().union(*(page_slots(geometry, block, chunk) for block in blocks))
        assert needed <= slots
        assert all(0 <= slot < -(-geometry.size_bytes // chunk) for slot in slots)
        assert len(slots) * chunk <= extents.extent_bytes
    assert seen == list(range(geometry.num_blocks))
    assert extents.bytes_of(range(extents.count)) <= -(-geometry.size_bytes // chunk) * chunk


@settings(max_examples=300, deadline=None)
@given(geometries(), st.sampled_from([512, 1024, 4096]))
def test_aligned_extents_share_no_slot(geometry: KvGeometry, granule: int) -> None:
    """Whenever the map says so, no two extents have a slot in common, and full extents cost the same."""
    extents = ExtentMap(geometry, choose_chunk_bytes(geometry, granule))
    assume(extents.aligned)
    slots = [slot for extent in range(extents.count) for slot in extents.slots_of(extent)]
    assert len(slots) == len(set(slots))
    full = [e for e in range(extents.count) if len(extents.blocks_of(e)) == extents.blocks_per_extent]
    assert {len(extents.slots_of(e)) for e in full} == {extents.extent_bytes // extents.chunk_bytes}
