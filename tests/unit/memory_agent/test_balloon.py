"""Balloon: extents get memory and give it back; all or nothing, whatever fails, on the fake and on the host backend."""

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from memory_agent.balloon import Balloon
from memory_agent.chunks import ChunkOwner, ChunkPool, PhysicalChunk
from memory_agent.errors import MemoryError_, OutOfDeviceMemory, PoolExhausted, SettingsError
from memory_agent.extents import ExtentMap, KvGeometry, KvRegion, choose_chunk_bytes
from memory_agent.fake_vmm import FakeVmm
from memory_agent.virtual_tensor import VirtualTensor
from memory_agent.vmm import Vmm
from tests.unit.memory_agent.failing_host_vmm import FailingHostVmm

PAGE = 4096


def layer_outermost(layers: int, page: int, blocks: int) -> KvGeometry:
    return KvGeometry(layers * page * blocks, blocks, (KvRegion(0, layers, page * blocks, page, page),))


ALIGNED = layer_outermost(3, 2 * PAGE, 12)
"""Extents of one block, 3 slots each."""
RUNS = layer_outermost(3, PAGE // 2, 32)
"""Extents of two blocks, 3 slots each."""
SHARING = layer_outermost(3, PAGE + PAGE // 2 + 512, 11)
"""Pages that fit no chunk: neighbours share slots."""
OVERLAY = KvGeometry(
    10 * 4 * PAGE, 10, (KvRegion(0, 4, PAGE, 4 * PAGE, PAGE), KvRegion(0, 1, PAGE, 4 * PAGE, 3 * PAGE))
)
"""Two groups over the same blocks, block-outermost."""
GROUPS = KvGeometry(
    3 * 12 * 3 * PAGE, 12, tuple(KvRegion(0, layers, 12 * 3 * PAGE, 3 * PAGE, 3 * PAGE) for layers in (3, 2, 1))
)
"""Three groups over the same blocks, layer-outermost."""
ODD = KvGeometry(PAGE + 11 * (5 * 1111 + 7), 11, (KvRegion(PAGE, 5, 1111, 5 * 1111 + 7, 1111),))
"""Block-outermost blocks, with a pad, that fit no chunk: neighbours share slots."""
GEOMETRIES = {
    "aligned": ALIGNED,
    "runs": RUNS,
    "sharing": SHARING,
    "overlay": OVERLAY,
    "groups": GROUPS,
    "odd": ODD,
}


@dataclass
class Setup:
    vmm: FakeVmm | FailingHostVmm
    pool: ChunkPool
    tensor: VirtualTensor
    extents: ExtentMap
    balloon: Balloon

    @classmethod
    def make(cls, backend: str, geometry: KvGeometry, limit_chunks: int = 1000) -> "Setup":
        chunk = choose_chunk_bytes(geometry, PAGE)
        capacity = geometry.size_bytes + 4 * chunk
        vmm = FakeVmm(PAGE, capacity) if backend == "fake" else FailingHostVmm("ellm-test", capacity)
        pool = ChunkPool(vmm, chunk, limit_chunks)
        tensor = VirtualTensor(vmm, geometry.size_bytes, chunk)
        extents = ExtentMap(geometry, chunk)
        return cls(vmm, pool, tensor, extents, Balloon(pool, tensor, extents))

    def state(self) -> tuple[frozenset[int], int, int, frozenset[int]]:
        """All that an undo must restore: extents, bytes by count and by the system, slots."""
        slots = frozenset(self.tensor.mapped_slots)
        return frozenset(self.balloon.mapped), self.balloon.committed_bytes, self.vmm.held_bytes(), slots

    def page_addresses(self, extent: int) -> Iterator[tuple[int, int]]:
        """(address, bytes) of each page of the first region, by the geometry's rule."""
        region = self.extents.geometry.regions[0]
        for block in self.extents.blocks_of(extent):
            for layer in range(region.layers):
                offset = region.offset_bytes + layer * region.layer_stride_bytes + block * region.block_stride_bytes
                yield self.tensor.address + offset, region.page_bytes


@pytest.fixture(params=["fake", "host"])
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., Setup]]:
    made: list[Vmm] = []

    def build(geometry: KvGeometry = ALIGNED, limit_chunks: int = 1000) -> Setup:
        setup = Setup.make(request.param, geometry, limit_chunks)
        made.append(setup.vmm)
        return setup

    yield build
    for vmm in made:
        vmm.close()


@pytest.mark.parametrize("name", GEOMETRIES)
def test_inflate_commits_exactly_the_extents_and_deflate_gives_all_back(make: Callable[..., Setup], name: str) -> None:
    """Held bytes, by the system, are those of the mapped extents at every moment, for every kind of geometry."""
    setup = make(GEOMETRIES[name])
    committed = setup.balloon.inflate_kv([0, 3, 4])
    assert committed == setup.vmm.held_bytes() == setup.extents.bytes_of([0, 3, 4])
    assert setup.balloon.mapped == {0, 3, 4}
    returned = setup.balloon.deflate_kv([3])
    assert setup.vmm.held_bytes() == committed - returned == setup.extents.bytes_of([0, 4])
    assert setup.balloon.deflate_kv([0, 4]) == committed - returned
    assert setup.vmm.held_bytes() == setup.balloon.committed_bytes == 0
    setup.balloon.check_conservation()


def test_repeated_orders_change_nothing(make: Callable[..., Setup]) -> None:
    """Inflating what has memory, deflating what has none, and naming an extent twice are harmless."""
    setup = make()
    assert setup.balloon.inflate_kv([1, 1, 2]) == 2 * setup.extents.extent_bytes
    assert setup.balloon.inflate_kv([2, 1]) == 0
    assert setup.balloon.deflate_kv([2, 2, 5]) == setup.extents.extent_bytes
    assert setup.balloon.deflate_kv([2]) == 0
    setup.balloon.check_conservation()


def test_an_extent_that_does_not_exist_changes_nothing(make: Callable[..., Setup]) -> None:
    """Inflating a list with one impossible extent raises IndexError and maps none of them."""
    setup = make()
    before = setup.state()
    with pytest.raises(IndexError):
        setup.balloon.inflate_kv([0, 12])
    assert setup.state() == before


def test_an_inflate_beyond_the_limit_is_refused_whole(make: Callable[..., Setup]) -> None:
    """With room for one extent, two at once are refused and nothing is committed; one then fits."""
    setup = make(limit_chunks=5)
    with pytest.raises(PoolExhausted):
        setup.balloon.inflate_kv([0, 1])
    assert setup.vmm.held_bytes() == 0
    assert setup.balloon.inflate_kv([0]) == setup.extents.extent_bytes


@pytest.mark.parametrize("name", GEOMETRIES)
def test_an_inflate_that_fails_at_any_call_leaves_no_trace(make: Callable[..., Setup], name: str) -> None:
    """For every create and every map of an inflate: when that call fails, all is as before, and a retry succeeds."""
    rehearsal = make(GEOMETRIES[name])
    rehearsal.balloon.inflate_kv([1])
    already = rehearsal.vmm.plan.calls.copy()
    rehearsal.balloon.inflate_kv([2, 0, 5])
    made = rehearsal.vmm.plan.calls - already
    points = [(call, nth) for call in ("create", "map") for nth in range(1, made[call] + 1)]
    assert len(points) >= 6
    for call, nth in points:
        setup = make(GEOMETRIES[name])
        setup.balloon.inflate_kv([1])
        before = setup.state()
        setup.vmm.plan.fail_at(call, nth)
        with pytest.raises(OutOfDeviceMemory, match=f"{call} number"):
            setup.balloon.inflate_kv([2, 0, 5])
        assert setup.state() == before
        setup.balloon.check_conservation()
        setup.balloon.inflate_kv([2, 0, 5])
        assert setup.balloon.mapped == {0, 1, 2, 5}
        setup.balloon.check_conservation()


@pytest.mark.parametrize("undo_call", ["unmap", "release"])
@pytest.mark.parametrize("nth", range(1, 6))
def test_an_undo_that_fails_too_is_accounted_and_made_good_later(
    make: Callable[..., Setup], undo_call: str, nth: int
) -> None:
    """When a map fails and then a call of the undo, the remnant is counted, and the next call gives it back."""
    setup = make()
    setup.vmm.plan.fail_at("map", 6)
    setup.vmm.plan.fail_at(undo_call, nth)
    with pytest.raises(OutOfDeviceMemory, match="map number"):
        setup.balloon.inflate_kv([0, 1])
    assert setup.balloon.mapped == set()
    assert setup.vmm.held_bytes() == setup.pool.held_bytes == setup.extents.chunk_bytes
    setup.balloon.check_conservation()
    setup.balloon.deflate_kv([])
    assert setup.vmm.held_bytes() == 0


@pytest.mark.parametrize("call", ["unmap", "release"])
@pytest.mark.parametrize("nth", range(1, 7))
def test_a_deflate_that_fails_at_any_call_gives_back_the_rest(make: Callable[..., Setup], call: str, nth: int) -> None:
    """For every unmap and release of a deflate: when it fails, one chunk stays, is counted, and goes next time."""
    setup = make()
    setup.balloon.inflate_kv([0, 1, 2])
    setup.vmm.plan.fail_at(call, nth)
    with pytest.raises(OutOfDeviceMemory, match=f"{call} number"):
        setup.balloon.deflate_kv([0, 2])
    assert setup.balloon.mapped == {1}
    assert setup.vmm.held_bytes() == setup.extents.extent_bytes + setup.extents.chunk_bytes
    setup.balloon.check_conservation()
    assert setup.balloon.deflate_kv([]) == setup.extents.chunk_bytes
    setup.balloon.check_conservation()


def test_a_remnant_is_used_by_the_next_inflate_of_its_extent(make: Callable[..., Setup]) -> None:
    """An extent whose slot could not be unmapped is inflated again around that slot, and is whole then."""
    setup = make()
    setup.balloon.inflate_kv([0])
    setup.vmm.plan.fail_at("unmap", 2)
    with pytest.raises(OutOfDeviceMemory):
        setup.balloon.deflate_kv([0])
    assert setup.balloon.inflate_kv([0]) == setup.extents.extent_bytes - setup.extents.chunk_bytes
    setup.balloon.check_conservation()
    assert setup.balloon.deflate_kv([0]) == setup.extents.extent_bytes


def test_kv_and_activations_share_one_limit(make: Callable[..., Setup]) -> None:
    """Chunks that activations hold are missing to the KV cache, and serve it once they are given."""
    setup = make(limit_chunks=6)
    activations = setup.pool.take(ChunkOwner.ACTIVATION, 4)
    with pytest.raises(PoolExhausted):
        setup.balloon.inflate_kv([0])
    setup.pool.give(ChunkOwner.ACTIVATION, activations)
    setup.balloon.inflate_kv([0])
    assert setup.pool.bytes_by_owner()[ChunkOwner.FREE] == setup.pool.chunk_bytes
    setup.balloon.check_conservation()


def test_parts_that_do_not_fit_together_are_refused() -> None:
    """Different chunk sizes, and a tensor smaller than the cache, are settings errors."""
    vmm = FakeVmm(PAGE, 100 * PAGE)
    extents, pool = ExtentMap(ALIGNED, 2 * PAGE), ChunkPool(vmm, 2 * PAGE, 10)
    with pytest.raises(SettingsError, match="chunk sizes differ"):
        Balloon(ChunkPool(vmm, PAGE, 10), VirtualTensor(vmm, ALIGNED.size_bytes, 2 * PAGE), extents)
    with pytest.raises(SettingsError, match="in a tensor of"):
        Balloon(pool, VirtualTensor(vmm, ALIGNED.size_bytes - PAGE, 2 * PAGE), extents)


def test_the_process_gives_memory_back_for_a_real_model_geometry() -> None:
    """SmolLM2 in float32: 20 blocks fill 112 MiB; after deflating 15 the process and the memory file are down to 5."""

    def resident() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Rss:")).split()[1]) * 1024

    setup = Setup.make("host", layer_outermost(30, 196608, 364))
    assert setup.extents.extent_bytes == 30 * 196608
    setup.balloon.inflate_kv(range(20))
    before = resident()
    for extent in range(20):
        for address, size in setup.page_addresses(extent):
            ctypes.memset(address, 1, size)
    full = resident()
    assert full - before >= 0.95 * 20 * setup.extents.extent_bytes
    assert setup.balloon.deflate_kv(range(15)) == 15 * setup.extents.extent_bytes
    assert full - resident() >= 0.95 * 15 * setup.extents.extent_bytes
    assert setup.vmm.held_bytes() == 5 * setup.extents.extent_bytes
    setup.vmm.close()


class BalloonMachine(RuleBasedStateMachine):
    """Random inflates, deflates, activations, limits and failures; after each step everything agrees, and no byte that
    was written into a mapped extent has changed."""

    backend = "fake"

    @initialize(name=st.sampled_from(sorted(GEOMETRIES)), limit=st.integers(3, 60))
    def build(self, name: str, limit: int) -> None:
        self.setup = Setup.make(self.backend, GEOMETRIES[name], limit)
        self.marks: dict[int, int] = {}
        self.next_mark = count(1)
        self.activations: list[PhysicalChunk] = []

    def teardown(self) -> None:
        self.setup.vmm.close()

    @rule(extents=st.lists(st.integers(0, 9), max_size=5))
    def inflate(self, extents: list[int]) -> None:
        """All of the extents get memory, or nothing changes but remnants of a refused undo."""
        setup = self.setup
        before = set(setup.balloon.mapped)
        tidy = setup.balloon.committed_bytes == setup.extents.bytes_of(before)  # no remnants
        tidy &= not setup.pool.bytes_by_owner()[ChunkOwner.FREE]
        try:
            committed = setup.balloon.inflate_kv(extents)
        except MemoryError_:
            assert setup.balloon.mapped == before
            return
        assert setup.balloon.mapped == before | set(extents)
        if tidy:
            assert committed == setup.extents.bytes_of(setup.balloon.mapped) - setup.extents.bytes_of(before)
        for extent in set(extents) - before:
            self.write(extent, reads_zero=tidy and setup.extents.aligned)

    @rule(extents=st.lists(st.integers(0, 9), max_size=5))
    def deflate(self, extents: list[int]) -> None:
        """The extents are out whatever the system says; without a refusal every byte that nobody needs is back."""
        setup = self.setup
        before = set(setup.balloon.mapped)
        try:
            setup.balloon.deflate_kv(extents)
        except OutOfDeviceMemory:
            pass
        else:
            activations = len(self.activations) * setup.pool.chunk_bytes
            assert setup.vmm.held_bytes() == setup.extents.bytes_of(setup.balloon.mapped) + activations
        assert setup.balloon.mapped == before - set(extents)
        for extent in extents:
            self.marks.pop(extent, None)

    @rule(chunks=st.integers(1, 6))
    def take_activations(self, chunks: int) -> None:
        try:
            self.activations += self.setup.pool.take(ChunkOwner.ACTIVATION, chunks)
        except MemoryError_:
            return

    @rule()
    def give_activations(self) -> None:
        self.setup.pool.give(ChunkOwner.ACTIVATION, self.activations)
        self.activations = []

    @rule(limit=st.integers(0, 60))
    def set_limit(self, limit: int) -> None:
        self.setup.pool.limit_chunks = limit

    @rule(call=st.sampled_from(["create", "release", "map", "unmap"]), nth=st.integers(1, 8), times=st.integers(1, 3))
    def fail(self, call: str, nth: int, times: int) -> None:
        self.setup.vmm.plan.fail_at(call, nth, times)

    def write(self, extent: int, reads_zero: bool) -> None:
        """Fill the extent's pages with a mark of its own; on the way see that new memory was zero where promised."""
        mark = self.marks[extent] = next(self.next_mark) % 250 + 1
        if self.backend == "host":
            for address, size in self.setup.page_addresses(extent):
                assert not reads_zero or ctypes.string_at(address, size) == bytes(size)
                ctypes.memset(address, mark, size)

    @invariant()
    def conserved(self) -> None:
        self.setup.balloon.check_conservation()

    @invariant()
    def written_data_stays(self) -> None:
        if self.backend != "host":
            return
        for extent, mark in self.marks.items():
            for address, size in self.setup.page_addresses(extent):
                assert ctypes.string_at(address, size) == bytes([mark]) * size


class HostBalloonMachine(BalloonMachine):
    """The same on real memory."""

    backend = "host"


TestBalloonMachineFake = BalloonMachine.TestCase
TestBalloonMachineFake.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestBalloonMachineHost = HostBalloonMachine.TestCase
TestBalloonMachineHost.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
