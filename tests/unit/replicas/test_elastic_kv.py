"""The scheduler's side of elastic KV memory, against a real vLLM block pool and simulated workers."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from memory_agent.extents import KvGeometry, KvRegion
from memory_agent.lease_board import LIMIT_UNIT_BYTES, AgentWord, EngineWord, Lease, LeaseBoard
from replicas.activation_ledger import ActivationSample
from replicas.elastic_kv import ElasticKv
from replicas.elastic_settings import ElasticSettings
from replicas.kv_moves import KvAck, KvHandshake, KvMoves
from replicas.kv_parking import ExtentState
from replicas.kv_plan import KvGroup
from replicas.step_demand import StepDemand

BLOCKS = 24
PAGE = LIMIT_UNIT_BYTES
TOKEN_BYTES = PAGE // 10
MEASURED = [ActivationSample(rows, rows, TOKEN_BYTES, 0) for rows in (1, 2)] + [
    ActivationSample(tokens, 1, tokens * TOKEN_BYTES, 0) for tokens in (8, 16)
]
"""Of small steps."""


class World:
    """One engine's scheduler side, with a clock, a board, a block pool and workers that the test plays."""

    def __init__(
        self, board: Path, ranks: int = 1, blocks_per_extent: int = 1, kv_first: bool = True, charge: bool = True
    ) -> None:
        self.now = 100.0
        self.board = LeaseBoard.create(board, BLOCKS * PAGE)
        self.ranks = ranks
        self.pool = BlockPool(BLOCKS, enable_caching=False, hash_block_size=16)
        geometry = KvGeometry(BLOCKS * PAGE, BLOCKS, (KvRegion(0, 1, BLOCKS * PAGE, PAGE, PAGE),))
        chunk = PAGE * blocks_per_extent
        self.extent_bytes = chunk * ranks
        self.set_limit_extents(2)
        handshake = KvHandshake(pid=1, memory_fd=3, chunk_bytes=chunk, mapped_extents=[0])
        self.kv = ElasticKv(
            ElasticSettings(
                str(board),
                0,
                rest_bytes=chunk,
                kv_guarantee_bytes=self.board.budget_bytes * ranks if kv_first else 0,
                charge_activations=charge,
                token_bytes=TOKEN_BYTES,
                row_bytes=1,
            ),
            geometry,
            (KvGroup(block_tokens=16, most_blocks=BLOCKS),),
            self.pool,
            [handshake] * ranks,
            clock=lambda: self.now,
        )
        self.in_flight: list[KvMoves] = []
        self.requests: list[list[KVCacheBlock]] = []

    def set_limit_extents(self, extents: int) -> None:
        row = self.board.row(0)
        row.set(AgentWord.LEASE, Lease(extents * self.extent_bytes, row.lease.revision + 1).pack())

    def step(self, wanted: int = 0, tokens: int = 0, least: int = 0, first: int = 0) -> KvMoves:
        """``wanted`` KV blocks, of which ``first`` are those of the first waiting request, as are all ``tokens``."""
        running = len(self.requests)
        demand = StepDemand(
            running=running,
            waiting=0,
            blocks_wanted=wanted,
            blocks_first=first,
            tokens_wanted=tokens,
            tokens_running=0,
            tokens_least=least,
            rows=running,
            blocks_returning=0,
            preemptions=0,
        )
        self.kv.begin_step(demand, self.preempt)
        moves = self.kv.take_moves(min(tokens, self.kv.token_budget), running)
        if moves.sequence:
            self.in_flight.append(moves)
        return moves

    def preempt(self) -> int:
        if not self.requests:
            return -1
        self.pool.free_blocks(self.requests.pop())
        return 0

    def answer(self, error: str | None = None) -> None:
        """Every rank answers every move in flight; with ``error`` the last rank fails."""
        for moves in self.in_flight:
            acks = [KvAck(moves.sequence, None, 0.001, 0.001) for _ in range(self.ranks - 1)]
            failed = error if moves.map else None
            self.kv.on_acks([*acks, KvAck(moves.sequence, failed, 0.001, 0.001)])
        self.in_flight.clear()

    def settle(self, wanted: int = 0) -> None:
        for _ in range(BLOCKS):
            self.step(wanted)
            self.answer()

    @property
    def committed(self) -> int:
        """Extents; activations, charged beside them, do not count."""
        row = self.board.row(0)
        return (row.get(EngineWord.COMMITTED_BYTES) - row.get(EngineWord.ACTIVATION_BYTES)) // self.extent_bytes

    @property
    def committed_bytes(self) -> int:
        return self.board.row(0).get(EngineWord.COMMITTED_BYTES)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    yield World(tmp_path / "board")


@pytest.fixture
def tight(tmp_path: Path) -> World:
    """One running request, a lease of 12 extents, and nothing that activations may not take."""
    world = World(tmp_path / "board", kv_first=False)
    world.set_limit_extents(12)
    world.requests = [[]]
    return world


def test_only_the_rest_is_usable_at_the_start(world: World) -> None:
    """Every other block is parked, and the board shows the engine."""
    assert world.pool.get_num_free_blocks() == 0  # the one mapped block is the null block
    assert world.committed == 1
    assert world.board.row(0).get(EngineWord.BLOCKS_CEILING) == BLOCKS
    world.kv.parking.check_conservation()


def test_a_block_is_usable_only_after_every_rank_has_mapped_it(tmp_path: Path) -> None:
    """With two ranks the first acknowledgement changes nothing."""
    world = World(tmp_path / "board", ranks=2)
    world.set_limit_extents(10)
    moves = world.step(wanted=3)
    assert moves.map
    world.kv.on_acks([KvAck(moves.sequence, None, 0.0, 0.0)])
    assert world.pool.get_num_free_blocks() == 0
    world.kv.on_acks([KvAck(moves.sequence, None, 0.0, 0.0)])
    assert world.pool.get_num_free_blocks() == len(moves.map)


def test_moves_are_counted_with_the_time_of_the_slowest_rank(tmp_path: Path) -> None:
    """Mapping and unmapping have counts, bytes and seconds of their own; a step that only maps counts as no unmap."""
    world = World(tmp_path / "board", ranks=2)
    row = world.board.row(0)
    world.set_limit_extents(10)
    grown = world.step(wanted=3)
    world.kv.on_acks([KvAck(grown.sequence, None, 0.5, map_s) for map_s in (0.25, 0.125)])
    assert (row.get(EngineWord.INFLATE_COUNT), row.get(EngineWord.INFLATE_NS)) == (1, 250_000_000)
    assert row.get(EngineWord.INFLATE_BYTES) == len(grown.map) * world.extent_bytes
    assert (row.get(EngineWord.DEFLATE_COUNT), row.get(EngineWord.DEFLATE_NS)) == (0, 0)
    world.set_limit_extents(1)
    shrunk = world.step()
    world.kv.on_acks([KvAck(shrunk.sequence, None, unmap_s, 0.5) for unmap_s in (0.125, 0.25)])
    assert (row.get(EngineWord.DEFLATE_COUNT), row.get(EngineWord.DEFLATE_NS)) == (1, 250_000_000)
    assert row.get(EngineWord.DEFLATE_BYTES) == len(shrunk.unmap) * world.extent_bytes
    assert row.get(EngineWord.INFLATE_NS) == 250_000_000


def test_a_rank_that_fails_aborts_the_move_on_all(tmp_path: Path) -> None:
    """The extents are unmapped again everywhere, and asked for later, not at once."""
    world = World(tmp_path / "board", ranks=2)
    world.set_limit_extents(10)
    asked = world.step(wanted=3).map
    world.answer(error="no memory")
    undo = world.step(wanted=3)
    assert sorted(undo.unmap) == sorted(asked)
    assert undo.map == []
    world.answer()
    assert world.committed == 1
    world.now += 1.0
    assert world.step(wanted=3).map


def test_a_smaller_lease_takes_free_extents_before_it_preempts(world: World) -> None:
    """Requests keep running as long as free memory satisfies the lease."""
    world.set_limit_extents(12)
    world.settle(wanted=10)
    world.requests = [world.pool.get_new_blocks(3)]
    world.set_limit_extents(4)
    world.settle()
    assert len(world.requests) == 1
    assert world.committed == 4


def test_a_lease_below_the_used_blocks_preempts(world: World) -> None:
    """When free memory does not suffice, the last request goes first."""
    world.set_limit_extents(12)
    world.settle(wanted=10)
    world.requests = [world.pool.get_new_blocks(3), world.pool.get_new_blocks(4)]
    world.set_limit_extents(4)
    world.settle()
    assert len(world.requests) == 1
    assert world.committed <= 4


def test_an_idle_engine_has_work_until_it_is_at_rest(world: World) -> None:
    """Nothing to do while its lease is read and its memory at rest; something while it holds more for too long."""
    world.set_limit_extents(12)
    world.settle(wanted=10)
    assert not world.kv.has_work()
    world.now += 10.0
    assert world.kv.has_work()
    world.step()
    assert world.kv.has_work()
    world.answer()
    assert world.committed == 1
    assert not world.kv.has_work()


def test_an_idle_engine_has_no_activations(world: World) -> None:
    """They stay while there may be a next step, and go back after a while without one."""
    world.set_limit_extents(12)
    world.requests = [[]]
    assert not world.step(tokens=20).rest
    assert world.board.row(0).get(EngineWord.ACTIVATION_BYTES) >= 20 * TOKEN_BYTES
    world.requests.clear()
    assert not world.step().rest
    assert not world.kv.has_work()
    world.now += 10.0
    assert world.kv.has_work()
    assert world.step().rest
    world.answer()
    assert world.board.row(0).get(EngineWord.ACTIVATION_BYTES) == 0
    assert not world.kv.has_work()


def test_activations_that_are_not_charged_bound_nothing(tmp_path: Path) -> None:
    """A step computes what it wants, the heap keeps what it takes, and an engine with nothing to do gives it back when
    its lease shrinks, or after a while."""
    world = World(tmp_path / "board", kv_first=False, charge=False)
    world.set_limit_extents(12)
    world.settle(wanted=10)
    world.requests = [[]]
    step = world.step(tokens=5000, least=4)
    assert (world.kv.token_budget, step.rest) == (5000, False)
    assert world.board.row(0).get(EngineWord.ACTIVATION_BYTES) == 0
    world.set_limit_extents(6)
    assert not world.step(tokens=5000).rest  # a shrink under a running request
    world.requests.clear()
    world.answer()
    assert not world.step().rest
    world.set_limit_extents(3)
    assert world.step().rest
    world.answer()
    world.now += 10.0
    assert not world.step().rest


def test_a_step_gets_the_tokens_that_kv_memory_leaves_room_for(tight: World) -> None:
    """Many with memory to spare, few when blocks in use leave little, never fewer than the running requests need."""
    tight.step(tokens=1000, least=4)
    assert 90 <= tight.kv.token_budget <= 115  # beside the null block
    tight.settle(wanted=10)
    tight.requests = [tight.pool.get_new_blocks(9)]
    tight.step(tokens=1000, least=4)
    assert 14 <= tight.kv.token_budget <= 20
    tight.step(wanted=10, tokens=1000, least=4)
    assert tight.kv.token_budget == 4
    assert tight.committed_bytes <= 12 * tight.extent_bytes


def test_a_step_leaves_the_blocks_of_the_first_waiting_prompt(tight: World) -> None:
    """It is admitted only where all of it fits: its tokens must not take the room of its own later blocks. Where it
    cannot fit the step has no use for its tokens."""
    tight.settle(wanted=10)
    tight.requests = [tight.pool.get_new_blocks(3)]
    tight.step(wanted=20, tokens=1000, least=4, first=6)
    assert 14 <= tight.kv.token_budget <= 20
    tight.step(wanted=20, tokens=1000, least=4, first=9)
    assert tight.kv.token_budget == 4


def test_free_blocks_make_room_for_the_tokens_of_a_step(tight: World) -> None:
    """Mapped ahead or kept as prefix cache, they go before a prefill gets fewer tokens; blocks in use stay."""
    tight.settle(wanted=10)
    tight.requests = [tight.pool.get_new_blocks(2)]
    moves = tight.step(wanted=3, tokens=50, least=4)
    assert tight.kv.token_budget == 50
    assert len(moves.unmap) == 4  # of 11 mapped, 7 leave room for 50 tokens
    assert tight.committed_bytes <= 12 * tight.extent_bytes


def test_heaps_keep_what_the_lease_has_to_spare(tight: World) -> None:
    """Where KV memory, with what is cached, and the step leave much of the lease, workers need not give back what steps
    free, once such steps were measured; where they do not, or a neighbour takes the bytes, they must. The lease holds
    it all."""
    tight.settle(wanted=3)
    limit_bytes = 12 * tight.extent_bytes
    assert not tight.step(tokens=8, least=4).keep_bytes
    tight.kv.on_activations(MEASURED)
    free = tight.step(tokens=8, least=4)
    assert 3 * tight.extent_bytes < free.keep_bytes < 5 * tight.extent_bytes
    assert not free.unmap
    assert tight.committed_bytes <= limit_bytes
    assert not tight.step(wanted=10, tokens=8, least=4).keep_bytes
    tight.answer()
    tight.settle()
    tight.set_limit_extents(5)
    assert not tight.step(tokens=8, least=4).keep_bytes
    assert tight.committed_bytes <= limit_bytes


def test_an_idle_engine_gives_up_what_its_heaps_keep(tight: World) -> None:
    """As soon as its lease no longer holds it."""
    tight.settle(wanted=3)
    tight.kv.on_activations(MEASURED)
    assert tight.step(tokens=8, least=4).keep_bytes
    tight.requests.clear()
    assert not tight.step().rest
    tight.set_limit_extents(5)
    assert tight.kv.has_work()
    moves = tight.step()
    assert (moves.rest, moves.keep_bytes) == (True, 0)


def test_what_workers_measure_replaces_the_estimate(tight: World) -> None:
    """Steps that take half of what was assumed may have about twice the tokens."""
    tight.step(tokens=1000, least=4)
    before = tight.kv.token_budget
    tight.kv.on_activations([ActivationSample(tokens, 1, tokens * TOKEN_BYTES // 2, 0) for tokens in (8, 64)])
    tight.step(tokens=1000, least=4)
    assert 1.6 * before < tight.kv.token_budget < 2.1 * before


def test_waiting_helps_only_while_memory_is_on_its_way(world: World) -> None:
    """With room under the lease, or a lease that the agent is raising, a request waits; otherwise it preempts."""
    world.set_limit_extents(3)
    world.settle(wanted=2)
    world.requests = [world.pool.get_new_blocks(2)]
    row = world.board.row(0)
    world.step(wanted=1)
    assert world.kv.waiting_helps()  # the agent has not had time to notice
    world.now += 0.3
    assert not world.kv.waiting_helps()
    row.set(AgentWord.TARGET_BYTES, 8 * world.extent_bytes)
    assert world.kv.waiting_helps()
    world.now += 2.0
    assert not world.kv.waiting_helps()
    world.set_limit_extents(8)
    world.step(wanted=0)
    assert world.kv.waiting_helps()
    assert world.kv.take_moves(0, 0).map


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.integers(1, 3), st.booleans(), st.data())
def test_memory_is_conserved_and_the_lease_obeyed(ranks: int, run: int, kv_first: bool, data: st.DataObject) -> None:
    """Along any sequence of leases, demands, allocations, failures and delays: no block in the free queue without
    memory, and after the moves have settled no more committed than the lease."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder) / "board", ranks, run, kv_first)
        allowed_bytes = 0
        for _ in range(data.draw(st.integers(1, 25))):
            action = data.draw(st.sampled_from(["lease", "allocate", "free", "step", "answer", "fail", "sleep"]))
            if action == "lease":
                world.set_limit_extents(data.draw(st.integers(2, 1 + BLOCKS // run)))
            elif action == "allocate":
                count = min(data.draw(st.integers(1, 6)), world.pool.get_num_free_blocks())
                if count:
                    world.requests.append(world.pool.get_new_blocks(count))
            elif action == "free":
                world.preempt()
            elif action == "step":
                limit_bytes = world.board.row(0).lease.limit_bytes
                before = world.committed
                # What an engine may hold is the highest lease until it has shrunk to the newest.
                allowed_bytes = max(limit_bytes, allowed_bytes if world.committed_bytes > limit_bytes else 0)
                world.step(data.draw(st.integers(0, 30)), tokens=data.draw(st.integers(0, 200)), least=4)
                assert world.committed <= max(limit_bytes // world.extent_bytes, before)
                if not kv_first:
                    # The smallest step runs even while a lowered lease waits for maps in flight.
                    least_bytes = world.kv.activations.bytes_for(4, len(world.requests))
                    assert world.committed_bytes <= allowed_bytes + least_bytes
            elif action == "sleep":
                world.now += data.draw(st.floats(0.01, 5.0))
            else:
                world.answer("no memory" if action == "fail" else None)
            world.kv.parking.check_conservation()
        world.answer()
        world.now += 1.0
        world.settle()
        world.kv.parking.check_conservation()
        assert world.kv.parking.count(ExtentState.MAPPING) == world.kv.parking.count(ExtentState.UNMAPPING) == 0
        limit = world.board.row(0).lease.limit_bytes // world.extent_bytes
        assert world.committed <= max(limit, 1)
