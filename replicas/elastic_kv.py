"""The scheduler's side of elastic KV memory: lease and demand in, moves out, acknowledgements back.

One step:  begin_step (read the lease, plan, park what must go)
           -> vLLM schedules with what is left -> take_moves (rides with the step to every worker)
           -> the workers unmap, map, run the forward -> on_acks (blocks that every rank has mapped become usable)
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from memory_agent.extents import ExtentMap, KvGeometry
from memory_agent.lease_board import NO_FD, AgentWord, EngineWord, LeaseBoard
from memory_agent.vmm import ContractViolation
from replicas.activation_ledger import ActivationLedger, ActivationSample, StepAllowance
from replicas.elastic_settings import ElasticSettings
from replicas.engine_words import EngineWords, Holding, StepBooks
from replicas.kv_moves import KvAck, KvHandshake, KvMoves
from replicas.kv_parking import ExtentState, KvParking
from replicas.kv_plan import KvGroup, KvPlan, KvState, blocks_within, plan_moves
from replicas.step_demand import NOTHING, StepDemand

logger = logging.getLogger(__name__)

_RETRY_S = 0.5
"""Pause after the operating system refused memory, before asking again."""


@dataclass
class _Flight:
    """A KvMoves that not every rank has answered yet, and what was held before it."""

    moves: KvMoves
    before: Holding
    acks: list[KvAck]


class ElasticKv:
    """State machine of one engine's extents. Lives in the scheduler's process; not thread-safe.

    Raises BoardError where the lease board cannot be used, ValueError where the ranks disagree on their memory.
    """

    def __init__(
        self,
        settings: ElasticSettings,
        geometry: KvGeometry,
        groups: Sequence[KvGroup],
        pool: BlockPool,
        handshakes: list[KvHandshake],
        on_evict: Callable[[KVCacheBlock], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        first = handshakes[0]
        for other in handshakes[1:]:
            if (other.chunk_bytes, other.mapped_extents) != (first.chunk_bytes, first.mapped_extents):
                raise ValueError(f"the ranks disagree on their KV memory: {first} and {other}")
        self._settings = settings
        self._clock = clock
        self._ranks = len(handshakes)
        self._extents = ExtentMap(geometry, first.chunk_bytes)
        self.parking = KvParking(pool, self._extents, first.mapped_extents, on_evict)
        # All ranks of an engine share the lease of its device.
        self._extent_bytes = self._extents.extent_bytes * self._ranks
        self._blocks_ceiling = geometry.num_blocks
        self._rest = len(first.mapped_extents)
        self._batch = self._batch_now = max(1, settings.map_batch_bytes // self._extent_bytes)
        self._groups = groups

        self.row = LeaseBoard.open(Path(settings.board_path)).row(settings.row)
        self._limit = self._soft_limit = self._wanted = self._rest
        self._plan = KvPlan()
        self._unmap_now: list[int] = []
        self._aborted: list[int] = []  # to be unmapped again: a rank failed in the middle of a move
        self._flights: dict[int, _Flight] = {}
        self._sequence = 0
        self._shortage = False
        self._over_since: float | None = None
        self._map_retry_at = 0.0
        self._unmap_retry_at = 0.0
        self._idle_shrink = False
        self._idle_since: float | None = clock()
        pooled = first.memory_fd == NO_FD  # a GPU's
        self.activations = ActivationLedger(settings.token_bytes, settings.row_bytes, self._ranks, pooled)
        self._allowance = StepAllowance(0, 0)
        self._rest_now = False
        self._before = Holding(0, 0)
        self._heaps_used = False
        self.block_bytes = self._extent_bytes // self._extents.blocks_per_extent
        """Of a KV block, over all ranks."""
        self._words = EngineWords(self.row, self.block_bytes)
        self._words.appear(
            handshakes,
            groups[0].block_tokens,
            self._blocks_ceiling,
            self._rest * self._extent_bytes,
            self._books(NOTHING),
        )
        logger.info(
            "KV memory: %d blocks at the ceiling, %d mapped, extents of %d blocks and %d bytes",
            self._blocks_ceiling,
            self.parking.mapped_blocks,
            self._extents.blocks_per_extent,
            self._extent_bytes,
        )

    # -- a step -------------------------------------------------------------------------------------------------------

    def begin_step(self, demand: StepDemand, preempt: Callable[[], int]) -> None:
        """Obey the lease and plan this step's moves, before vLLM schedules.

        Args:
            demand: of the queues now.
            preempt: preempts one running request and returns how many of its blocks become free only after the steps
                in flight; -1 when no running request is left.
        """
        now = self._clock()
        lease = self.row.lease
        self._limit = self._soft_limit = self._kv_limit(lease.limit_bytes, demand)
        self._wanted = self._extents_for(demand.blocks_wanted)
        self._over_since = None if self._wanted <= self._limit else self._over_since or now
        self._idle_since = None if demand.busy else self._idle_since or now
        self._shortage = False
        self._before = Holding(self._kv_bytes(), self._activation_bytes)
        self._allowance = StepAllowance(0, 0)
        if demand.busy:
            self._plan_activations(lease.limit_bytes, demand)
        self._plan = plan_moves(
            KvState(
                limit=self._limit,
                soft_limit=self._soft_limit,
                mapped=self._n(ExtentState.MAPPED),
                mapping=self._n(ExtentState.MAPPING),
                unmapping=self._n(ExtentState.UNMAPPING),
                wanted=self._wanted,
                rest=self._rest,
                idle=self._is_idle(now),
                batch=self._batch_now if now >= self._map_retry_at else 0,
            )
        )
        self._unmap_now = self.parking.begin_unmap(self._plan.shrink)
        self._idle_shrink = not demand.busy and bool(self._unmap_now)
        if self._plan.forced:
            self._preempt_until_it_fits(demand.blocks_returning, preempt)
        if demand.busy:
            self._cut_activations(lease.limit_bytes, demand)
            self.activations.keep_bytes = self._allowance.keep_bytes
        over = self._kv_bytes() + self._activation_bytes > lease.limit_bytes
        self._rest_now = not demand.busy and self._heaps_used and (over or self._plan.shrink > 0 or self._is_idle(now))
        if self._rest_now:
            self._heaps_used = False
            self.activations.on_rest()
        self._publish_held(self._allowance.charged_bytes if demand.busy else self._activation_bytes)
        self._words.begin_step(demand, self._books(demand), lease.revision)

    def take_moves(self, tokens: int, rows: int) -> KvMoves:
        """The moves to send with this step, of ``tokens`` of ``rows`` requests; they are in flight until every rank has
        answered."""
        grow = max(self._plan.grow, 1) if self._shortage else self._plan.grow
        moves = KvMoves(
            unmap=self._unmap_now + self._take_aborted(),
            check=self._extents_to_check() if self._idle_shrink else None,
            map=self.parking.begin_map(min(grow, self._soft_limit - self._committed)),
            rest=self._rest_now,
            keep_bytes=self.activations.keep_bytes // self._ranks,
            tokens=tokens,
            rows=rows,
            step_bytes=self.activations.bytes_for(tokens, rows) // self._ranks,
        )
        self.activations.on_step(tokens, rows)
        self._heaps_used |= tokens > 0
        self._plan, self._unmap_now = KvPlan(), []
        if moves.unmap or moves.map or moves.rest:
            self._sequence += 1
            moves.sequence = self._sequence
            self._flights[moves.sequence] = _Flight(moves, self._before, [])
        self._publish_held(self._activation_bytes)
        return moves

    def on_acks(self, acks: Iterable[KvAck]) -> None:
        """Answers of workers; a move counts when all ranks have answered."""
        for ack in acks:
            flight = self._flights.get(ack.sequence)
            if flight is None:
                continue
            flight.acks.append(ack)
            if len(flight.acks) == self._ranks:
                del self._flights[ack.sequence]
                self._finish(flight)

    def on_activations(self, samples: Iterable[ActivationSample]) -> None:
        """What workers measured of the step before the one that they answer."""
        for sample in samples:
            self.activations.observe(sample)

    @property
    def token_budget(self) -> int:
        """Most tokens of the step that is being scheduled."""
        return self._allowance.tokens

    def waiting_helps(self) -> bool:
        """A running request found no free block: is memory on its way, so that it should wait instead of preempting?"""
        if self._n(ExtentState.MAPPING):
            return True
        now = self._clock()
        if now < self._map_retry_at:
            return False
        if self._committed < self._soft_limit and self._n(ExtentState.PARKED):
            self._shortage = True
            return True
        self._over_since = self._over_since or now
        raising = self.row.get(AgentWord.TARGET_BYTES) > self.row.lease.limit_bytes
        return now - self._over_since < (self._settings.patience_s if raising else self._settings.notice_s)

    def has_work(self) -> bool:
        """True while an engine without requests must step: a lease unread, moves in flight, idle memory."""
        if self._flights or self.row.lease.revision != self.row.get(EngineWord.APPLIED_REVISION):
            return True
        if self._aborted and self._clock() >= self._unmap_retry_at:
            return True
        return self._is_idle(self._clock()) and (self._heaps_used or self.parking.has_free_extent_beyond(self._rest))

    @property
    def usage(self) -> float:
        """Used share of the capacity that the lease makes reachable, 0 to 1."""
        reachable = self._blocks_in(max(self._limit, self._n(ExtentState.MAPPED)))
        return min(1.0, self.parking.used_blocks / reachable) if reachable > 0 else 0.0

    @property
    def free_blocks(self) -> int:
        """Blocks that requests do not use and the lease allows, mapped or not; negative where they use more."""
        return self._blocks_in(self._limit) - self.parking.used_blocks

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _committed(self) -> int:
        return self._n(ExtentState.MAPPED) + self._n(ExtentState.MAPPING) + self._n(ExtentState.UNMAPPING)

    def _blocks_in(self, extents: int) -> int:
        """Blocks for requests, without vLLM's null block, in so many extents."""
        return min(extents * self._extents.blocks_per_extent, self._blocks_ceiling) - 1

    def _n(self, state: ExtentState) -> int:
        return self.parking.count(state)

    def _is_idle(self, now: float) -> bool:
        return self._idle_since is not None and now - self._idle_since >= self._settings.idle_release_s

    def _kv_limit(self, limit_bytes: int, demand: StepDemand) -> int:
        """Extents that the lease leaves to the KV cache beside the smallest step, which must always be possible: the
        same at any load, so that a request that starts never takes the memory of one that runs."""
        if not self._settings.charge_activations:
            return limit_bytes // self._extent_bytes
        lent = limit_bytes < self.row.get(AgentWord.GUARANTEE_BYTES)
        least_bytes = self._rest * self._extent_bytes if lent else self._settings.kv_guarantee_bytes
        left = max(limit_bytes - self._least_step_bytes(demand), min(limit_bytes, least_bytes))
        return left // self._extent_bytes

    def _plan_activations(self, limit_bytes: int, demand: StepDemand) -> None:
        """The largest step whose KV memory and activations fit the lease together. KV memory that the step does not
        need, kept for later steps and as prefix cache, gives way to its tokens; memory in use does not. Running
        requests go first: where they can have as many tokens beside all of the first waiting prompt, it is let in."""
        least, most = demand.tokens_least, max(demand.tokens_least, demand.tokens_wanted)
        if not self._settings.charge_activations:
            self._allowance = StepAllowance(most, 0)
            return

        def allow(kept_blocks: int, most: int) -> StepAllowance:
            def room(tokens: int) -> int:
                within = blocks_within(self._groups, tokens, demand.rows)
                needed = max(kept_blocks, min(demand.blocks_wanted, within))
                return limit_bytes - self._extents_for(needed) * self._extent_bytes

            return self.activations.allow(room, least, most, demand.rows)

        allowance = allow(0, max(least, demand.tokens_running))
        if self._extents_for(demand.blocks_first) <= self._limit:
            with_first = allow(demand.blocks_first, most)
            allowance = max(with_first, allowance, key=lambda one: one.tokens)
        kv_bytes = max(self._wanted, self._committed) * self._extent_bytes
        slack_bytes = limit_bytes - kv_bytes - allowance.charged_bytes
        keep_bytes = self.activations.keep_in(slack_bytes, allowance.tokens, demand.rows)
        self._allowance = allowance.keeping(keep_bytes)
        if self._allowance.tokens > least or keep_bytes:
            left = (limit_bytes - self._allowance.charged_bytes) // self._extent_bytes
            self._soft_limit = min(self._limit, max(left, self._rest))

    def _cut_activations(self, limit_bytes: int, demand: StepDemand) -> None:
        """Where blocks in use have kept more KV memory mapped than planned, the step gets fewer tokens."""
        if self._settings.charge_activations:
            room = limit_bytes - self._kv_bytes()
            planned = self._allowance
            allowance = self.activations.allow(lambda _: room, demand.tokens_least, planned.tokens, demand.rows)
            keep_bytes = min(planned.keep_bytes, max(0, room - allowance.charged_bytes))
            self._allowance = allowance.keeping(keep_bytes)

    def _extents_for(self, more_blocks: int) -> int:
        """Extents that hold the blocks in use, the null block and so many more."""
        return -(-(self.parking.used_blocks + 1 + more_blocks) // self._extents.blocks_per_extent)

    def _kv_bytes(self) -> int:
        """KV memory when the moves in flight, and those of the coming step so far, have been made."""
        going = sum(len(flight.moves.unmap) for flight in self._flights.values())
        return (self._committed + self._plan.grow - going - len(self._unmap_now)) * self._extent_bytes

    @property
    def _activation_bytes(self) -> int:
        return self.activations.charged_bytes if self._settings.charge_activations else 0

    def _preempt_until_it_fits(self, blocks_returning: int, preempt: Callable[[], int]) -> None:
        """The lease is below what requests use: preempt until enough extents are, or are about to be, free."""
        missing = self._plan.forced - len(self._unmap_now)
        while missing - blocks_returning // self._extents.blocks_per_extent > 0:
            returning = preempt()
            if returning < 0:
                break
            blocks_returning += returning
            more = self.parking.begin_unmap(missing)
            self._unmap_now += more
            missing -= len(more)

    def _finish(self, flight: _Flight) -> None:
        errors = [ack.error for ack in flight.acks if ack.error]
        moves = flight.moves
        if errors:
            self._undo(moves, errors[0])
        else:
            self.parking.finish_unmap(moves.unmap)
            self.parking.finish_map(moves.map)
            if moves.map:
                self._batch_now = min(self._batch, 2 * self._batch_now)
            unmap_s, map_s = (
                max(took) for took in zip(*((ack.unmap_s, ack.map_s) for ack in flight.acks), strict=True)
            )
            self._words.count_unmapped(len(moves.unmap) * self._extent_bytes, unmap_s)
            self._words.count_mapped(len(moves.map) * self._extent_bytes, map_s)
        if errors or moves.check is not None:
            self._check_books([ack.imbalance for ack in flight.acks if ack.imbalance])
        self._before = Holding(0, 0)
        self._publish_held(self._activation_bytes)

    def _undo(self, moves: KvMoves, error: str) -> None:
        """Ranks differ in how far they came: all of the move is unmapped again, until every rank has done it."""
        logger.warning(
            "moving %d extents failed, retrying in %.1f s: %s", len(moves.unmap + moves.map), _RETRY_S, error
        )
        self.parking.abort_map(moves.map)
        self._aborted += moves.unmap + moves.map
        self._batch_now = max(1, len(moves.map) // 2)  # where less is left, less may be had
        self._map_retry_at = self._clock() + _RETRY_S
        if not moves.map:
            self._unmap_retry_at = self._map_retry_at
        self._words.add(EngineWord.MAP_FAILURES, 1)

    def _take_aborted(self) -> list[int]:
        if self._clock() < self._unmap_retry_at:
            return []
        taken, self._aborted = self._aborted, []
        return taken

    def _extents_to_check(self) -> int | None:
        """What every rank has mapped after this move; None while a map is on its way or being undone."""
        if self._aborted or self._n(ExtentState.MAPPING):
            return None
        return self._n(ExtentState.MAPPED)

    def _check_books(self, imbalances: list[str]) -> None:
        """After an undo and when an idle engine shrinks. A defect is told and counted; it ends no request."""
        try:
            self.parking.check_conservation()
        except ContractViolation as violation:
            imbalances.append(str(violation))
        for imbalance in imbalances:
            logger.error("KV memory does not balance, which is a defect of this program: %s", imbalance)
            self._words.add(EngineWord.CONSERVATION_FAILURES, 1)

    def _publish_held(self, activation_bytes: int) -> None:
        """What can be held before, between and after the moves in flight, when the newest step takes so much."""
        after = Holding(self._kv_bytes(), activation_bytes)
        moments = [after, self._before, *(flight.before for flight in self._flights.values())]
        self._words.hold(moments, self.activations.held_bytes)

    def _books(self, demand: StepDemand) -> StepBooks:
        rest_bytes = self._rest * self._extent_bytes
        charged = self._settings.charge_activations
        step_bytes = self.activations.bytes_for(demand.tokens_wanted, demand.rows) if charged else 0
        return StepBooks(
            used_blocks=self.parking.used_blocks,
            mapped_blocks=self.parking.mapped_blocks,
            demand_bytes=max(self._wanted * self._extent_bytes, rest_bytes) + step_bytes,
            floor_bytes=rest_bytes + (self._least_step_bytes(demand) if charged else 0),
            token_budget=self._allowance.tokens,
        )

    def _least_step_bytes(self, demand: StepDemand) -> int:
        return self.activations.bytes_for(demand.tokens_least, demand.tokens_least)
