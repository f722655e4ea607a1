"""The scheduler's side of elastic KV memory with real workers' memory on several ranks, any of which may be refused."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from memory_agent.extents import ExtentMap, KvGeometry, KvRegion
from memory_agent.lease_board import LIMIT_UNIT_BYTES, AgentWord, EngineWord, Lease, LeaseBoard
from replicas import kv_memory
from replicas.elastic_kv import ElasticKv
from replicas.elastic_settings import ElasticSettings
from replicas.kv_memory import KvMemory
from replicas.kv_moves import KvAck, KvHandshake
from replicas.kv_plan import KvGroup
from replicas.step_demand import StepDemand
from tests.unit.memory_agent.failing_host_vmm import FailingHostVmm

BLOCKS, PAGE, LAYERS = 20, LIMIT_UNIT_BYTES // 4, 2
LAYER_BY_LAYER = KvGeometry(
    LAYERS * BLOCKS * PAGE,
    BLOCKS,
    (KvRegion(0, LAYERS, BLOCKS * PAGE, PAGE, PAGE), KvRegion(0, 1, BLOCKS * PAGE, PAGE, PAGE)),
)
BLOCK_BY_BLOCK = KvGeometry(LAYERS * BLOCKS * PAGE, BLOCKS, (KvRegion(0, LAYERS, PAGE, LAYERS * PAGE, PAGE),))
SHARED_SLOTS = KvGeometry(LAYERS * BLOCKS * 5000, BLOCKS, (KvRegion(0, LAYERS, BLOCKS * 5000, 5000, 5000),))


class Engine:
    """One engine: a scheduler's block pool, and the memory of each rank, of ``room_bytes`` where that is given."""

    def __init__(self, board: Path, geometry: KvGeometry, ranks: int, room_bytes: int | None) -> None:
        self._room_bytes = room_bytes
        self.now = 100.0
        self.row = LeaseBoard.create(board, 1 << 30).row(0)
        self.vmms: list[FailingHostVmm] = []
        with patch.object(kv_memory, "HostVmm", self._make_vmm):
            self.memories = [KvMemory(geometry, rest_bytes=0) for _ in range(ranks)]
        self.pool = BlockPool(BLOCKS, enable_caching=False, hash_block_size=16)
        self.extents = ExtentMap(geometry, self.memories[0].chunk_bytes)
        self.extent_bytes = self.extents.extent_bytes * ranks
        self.set_limit(1)
        self.kv = ElasticKv(
            ElasticSettings(
                str(board),
                0,
                rest_bytes=0,
                kv_guarantee_bytes=1 << 30,
                charge_activations=False,
                token_bytes=1,
                row_bytes=1,
            ),
            geometry,
            (KvGroup(block_tokens=16, most_blocks=geometry.num_blocks),),
            self.pool,
            [KvHandshake(1, memory.fd, memory.chunk_bytes, sorted(memory.mapped)) for memory in self.memories],
            clock=lambda: self.now,
        )
        self.requests: list[list[KVCacheBlock]] = []
        self.acks: list[list[KvAck]] = []

    def close(self) -> None:
        for vmm in self.vmms:
            vmm.close()

    def set_limit(self, extents: int) -> None:
        """A lease in whole units, of at least ``extents``."""
        units = -(-extents * self.extent_bytes // LIMIT_UNIT_BYTES)
        self.row.set(AgentWord.LEASE, Lease(units * LIMIT_UNIT_BYTES, self.row.lease.revision + 1).pack())

    def step(self, wanted: int) -> None:
        """Every rank carries out the step's moves; the scheduler hears of it by ``hear``."""
        running = len(self.requests)
        demand = StepDemand(
            running=running,
            waiting=0,
            blocks_wanted=wanted,
            blocks_first=0,
            tokens_wanted=running,
            tokens_running=running,
            tokens_least=1,
            rows=running,
            blocks_returning=0,
            preemptions=0,
        )
        self.kv.begin_step(demand, self.preempt)
        moves = self.kv.take_moves(running, running)
        if moves.sequence:
            self.acks.append([memory.apply(moves) for memory in self.memories])

    def hear(self) -> None:
        for acks in self.acks:
            self.kv.on_acks(acks)
        self.acks.clear()

    def preempt(self) -> int:
        if not self.requests:
            return -1
        self.pool.free_blocks(self.requests.pop())
        return 0

    def check(self) -> None:
        """Each block that vLLM uses, or could use now, has memory on every rank."""
        usable = [*self.pool.free_block_queue.get_all_free_blocks(), self.pool.null_block]
        usable += [block for blocks in self.requests for block in blocks]
        extents = {self.extents.extent_of(block.block_id) for block in usable}
        for rank, memory in enumerate(self.memories):
            assert extents <= memory.mapped, f"rank {rank} lacks {extents - memory.mapped}"
        self.kv.parking.check_conservation()

    def _make_vmm(self, name: str, max_bytes: int) -> FailingHostVmm:
        self.vmms.append(FailingHostVmm(name, self._room_bytes or max_bytes))
        return self.vmms[-1]


@contextmanager
def an_engine(geometry: KvGeometry, ranks: int, room_bytes: int | None = None) -> Iterator[Engine]:
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(Path(folder) / "board", geometry, ranks, room_bytes)
        try:
            yield engine
        finally:
            engine.close()


def test_a_refused_rank_aborts_on_all() -> None:
    """What the first rank has mapped goes back when the second one is refused the last chunk that it needs."""
    with an_engine(LAYER_BY_LAYER, ranks=2) as engine:
        engine.set_limit(10)
        engine.vmms[1].plan.fail_at("create", nth=4 * LAYERS)
        engine.step(wanted=4)
        assert engine.memories[0].mapped > {0} == engine.memories[1].mapped
        engine.hear()
        engine.check()
        engine.step(wanted=4)
        engine.hear()
        assert engine.memories[0].mapped == engine.memories[1].mapped == {0}
        assert engine.vmms[0].held_bytes() == engine.vmms[1].held_bytes() == engine.extents.extent_bytes
        assert engine.row.get(EngineWord.MAP_FAILURES) == 1
        engine.now += 1.0
        engine.step(wanted=4)
        engine.hear()
        assert engine.memories[0].mapped == engine.memories[1].mapped > {0}
        engine.check()


def test_what_is_left_is_had_little_by_little() -> None:
    """After a refusal less is asked for, so that an engine uses the memory there is, and more when there is more."""
    with an_engine(LAYER_BY_LAYER, ranks=2, room_bytes=6 * LAYERS * PAGE) as engine:
        engine.set_limit(BLOCKS)
        engine.requests.append([])  # not idle
        for _ in range(20):
            engine.now += 1.0
            engine.step(wanted=BLOCKS)
            engine.hear()
            engine.check()
        assert [len(memory.mapped) for memory in engine.memories] == [6, 6]


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([LAYER_BY_LAYER, BLOCK_BY_BLOCK, SHARED_SLOTS]), st.integers(1, 3), st.data())
def test_ranks_never_part(geometry: KvGeometry, ranks: int, data: st.DataObject) -> None:
    """Along any sequence of leases, demands, refusals on any rank and delays, vLLM never has a block that some rank has
    not mapped; when all is done, every rank holds the same, by the operating system."""
    with an_engine(geometry, ranks) as engine:
        for _ in range(data.draw(st.integers(1, 25))):
            action = data.draw(st.sampled_from(["lease", "take", "free", "step", "step", "hear", "refuse", "sleep"]))
            if action == "lease":
                engine.set_limit(data.draw(st.integers(1, engine.extents.count)))
            elif action == "take" and engine.pool.get_num_free_blocks():
                most = engine.pool.get_num_free_blocks()
                engine.requests.append(engine.pool.get_new_blocks(data.draw(st.integers(1, most))))
            elif action == "free":
                engine.preempt()
            elif action == "step":
                engine.step(data.draw(st.integers(0, BLOCKS)))
            elif action == "hear":
                engine.hear()
            elif action == "refuse":
                plan = engine.vmms[data.draw(st.integers(0, ranks - 1))].plan
                plan.fail_at(data.draw(st.sampled_from(["create", "map"])), data.draw(st.integers(1, 6)))
            else:
                engine.now += data.draw(st.floats(0.01, 2.0))
            engine.check()
        for vmm in engine.vmms:
            vmm.plan.clear()
        for _ in range(4):
            engine.now += 1.0
            engine.hear()
            engine.step(0)
            engine.check()
        engine.hear()
        assert len({frozenset(memory.mapped) for memory in engine.memories}) == 1
        assert {vmm.held_bytes() for vmm in engine.vmms} == {engine.extents.bytes_of(engine.memories[0].mapped)}
