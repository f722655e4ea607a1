"""Keeps the leases of one device: the rows of its board from registration to the exit of the last process.

    register         the engine puts its PID up         its processes have exited
    FREE --> STARTING ----------------------> LIVE -----------------------------> FREE
                 | registrar exits             | unregister, or the scheduler process exits first
                 +-----> FREE                  +--> LEAVING -- the last process exits --> FREE

Hard state lives on the board alone. Whoever opens a board finds in it everything needed to go on: rows, limits,
exposures, guarantees and the processes to watch. What is kept here besides is smoothing, and is rebuilt in a second.
"""

import logging
from dataclasses import replace
from pathlib import Path

from memory_agent.errors import SettingsError
from memory_agent.lease_board import MAX_ROWS, MAX_WORKERS, AgentWord, EngineWord, LeaseBoard, Row, RowState
from memory_agent.lease_planner import plan_leases
from memory_agent.pressure import Pressure, usage_ratio
from memory_agent.processes import ExitWatch, shared_segments
from memory_agent.staging import segments_of
from memory_agent.start_lease import Stake, check_stakes, choose_starts, excess_bytes
from memory_agent.tenant import EngineTerms, Role, Tenant, process_words

_SETTLE_S = 1.0
"""Longer than smoothing lasts: a board that has not changed for this long gives the same plan and pressure again."""

logger = logging.getLogger(__name__)


class LeaseKeeper:
    """The agent's logic on one board, without any transport. One per board; not thread-safe."""

    def __init__(self, path: Path, budget_bytes: int, weights_bytes: int = 0) -> None:
        """Open the board at ``path`` and go on with what it says, its budget included; make it where there is none.

        weights_bytes: set aside for weights beside the budget. Raises BoardError where the file is a board of another
        version.
        """
        self.board = LeaseBoard.create(path, budget_bytes, weights_bytes)
        self.pressure = Pressure()
        self._exits: ExitWatch[tuple[int, int]] = ExitWatch()
        self._tenants: dict[int, Tenant] = {}
        self._seen: list[list[int]] = []
        self._settled_at_s = float("inf")
        for row in self.board.rows():
            tenant = self._tenants[row.index] = Tenant(row, row.engine_id, row.model)
            logger.info("row %d of engine %s taken over, %s", row.index, tenant.engine_id, row.state.name)

    @property
    def tenants(self) -> list[Tenant]:
        """Every row in use, in row order."""
        return [self._tenants[index] for index in sorted(self._tenants)]

    def register(self, terms: EngineTerms) -> Row:
        """The engine's row, STARTING, its limit at what it may claim as far as bytes are free; the rest follows as
        others give back, or have started. The same engine again gets the row it has. Raises SettingsError where it can
        never fit."""
        self._follow_processes()  # a life of this engine that has just ended must not pass its row on
        known = self._find(terms.engine_id)
        if known is not None:
            return known.row
        self._check([*self._stakes().values(), terms.stake()])
        index = next((index for index in range(MAX_ROWS) if index not in self._tenants), None)
        if index is None:
            raise SettingsError(f"the board of this device has no free row: {MAX_ROWS} engines share it, no more fit")
        row = self.board.row(index)
        row.clear()
        tenant = Tenant.begin(row, terms)
        self._watch(tenant)
        if Role.REGISTRAR not in tenant.alive:
            raise SettingsError(f"registrar_pid {terms.registrar_pid} is no process of this node; pass the caller's")
        tenant.enter(RowState.STARTING)
        self._tenants[index] = tenant
        logger.info(
            "engine %s registered in row %d, guarantee %d bytes; its start takes %d, beside weights of %d",
            terms.engine_id,
            index,
            terms.guarantee_bytes,
            terms.start_bytes,
            terms.weights_bytes,
        )
        self._plan()
        return row

    def unregister(self, engine_id: str) -> None:
        """The engine is on its way out, and its exit is no death. Its bytes are lent to others once its processes have
        exited, at once if it never came up. An unknown engine changes nothing."""
        tenant = self._find(engine_id)
        if tenant is None:
            return
        logger.info("engine %s unregistered", engine_id)
        self._watch(tenant)
        if tenant.row.get(EngineWord.PID):
            tenant.enter(RowState.LEAVING)
        else:
            self._release(tenant)

    def set_budget(self, budget_bytes: int, weights_bytes: int | None = None) -> None:
        """Bytes the engines share from now on, and those set aside for their weights, where these change; a lower
        budget takes effect as engines give back.

        Raises SettingsError where the guarantees, the weights or a start do not fit.
        """
        room_bytes = self.board.weights_bytes if weights_bytes is None else weights_bytes
        check_stakes(list(self._stakes().values()), budget_bytes, room_bytes)
        self.board.budget_bytes, self.board.weights_bytes = budget_bytes, room_bytes
        self._seen = []  # no word of a row shows it, but it changes the pressure
        self._plan()

    def set_limits(self, engine_id: str, guarantee_bytes: int, ceiling_bytes: int) -> None:
        """What this engine can always get and what it may hold at most, from now on. A limit below what it holds takes
        effect as it gives back.

        Raises SettingsError for an unknown engine, a ceiling below the guarantee, and a guarantee that does not fit.
        """
        tenant, stakes = self._find(engine_id), self._stakes()
        if tenant is None:
            known = ", ".join(sorted(stakes)) or "none"
            raise SettingsError(f"no engine {engine_id} on this device; registered are: {known}")
        if not 0 < guarantee_bytes <= ceiling_bytes:
            raise SettingsError(
                f"engine {engine_id}: the guarantee would be {guarantee_bytes} bytes, the ceiling {ceiling_bytes}; "
                "0 < guarantee <= ceiling is needed"
            )
        stakes[engine_id] = replace(stakes[engine_id], guarantee_bytes=guarantee_bytes)
        self._check(list(stakes.values()))
        tenant.limit(guarantee_bytes, ceiling_bytes)
        self._seen = []  # the words that are followed do not show it
        self._plan()

    def tick(self, now_s: float) -> bool:
        """Notice exits, follow acknowledgements, plan, issue. True when a pressure level changed. now_s: monotonic.

        Costs a few loads an engine where nothing has changed for a while.
        """
        exited = self._note_exits()
        seen = [tenant.sample(now_s) for tenant in self.tenants]
        if exited or seen != self._seen:
            self._seen, self._settled_at_s = seen, now_s + _SETTLE_S
        elif now_s > self._settled_at_s:
            return False
        self._follow_processes()
        self._plan()
        return self._press()

    def close(self) -> None:
        """Stop watching and unmap the board; rows and leases stay as they are."""
        self._exits.close()
        self.board.close()

    def _follow_processes(self) -> None:
        """Bring every row to the state that its processes are in now."""
        self._note_exits()
        for tenant in self.tenants:
            self._watch(tenant)
            self._advance(tenant)

    def _note_exits(self) -> bool:
        exited = self._exits.collect()
        for index, role in exited:
            self._tenants[index].alive.discard(role)
        return bool(exited)

    def _watch(self, tenant: Tenant) -> None:
        """Watch the processes that are on the board by now and not watched yet."""
        for role in tenant.roles():
            if role in tenant.watched:
                continue
            tenant.watched.add(role)
            row, (pid_word, start_word) = tenant.row, process_words(role)
            try:
                row.set(start_word, self._exits.add((row.index, role), row.get(pid_word), row.get(start_word)))
            except ProcessLookupError as gone:
                logger.info("engine %s: %s", tenant.engine_id, gone)
            else:
                tenant.alive.add(role)
                if role != Role.REGISTRAR:
                    tenant.segments |= shared_segments([row.get(pid_word)])

    def _advance(self, tenant: Tenant) -> None:
        """Move the row along the picture above."""
        row = tenant.row
        if tenant.state is RowState.STARTING:
            if row.get(EngineWord.PID):
                tenant.enter(RowState.LIVE)
                logger.info("engine %s is live, process %d", tenant.engine_id, row.get(EngineWord.PID))
            elif Role.REGISTRAR not in tenant.alive:
                self._count_dead(tenant, f"process {row.get(AgentWord.REGISTRAR_PID)}, which was starting it, exited")
                self._release(tenant)
                return
        if tenant.state is RowState.LIVE and Role.ENGINE not in tenant.alive:
            self._count_dead(tenant, f"its process {row.get(EngineWord.PID)} exited")
            tenant.enter(RowState.LEAVING)
        if tenant.state is RowState.LEAVING and tenant.alive <= {Role.REGISTRAR}:
            self._release(tenant)

    def _count_dead(self, tenant: Tenant, cause: str) -> None:
        self.board.dead_engines += 1
        logger.warning("engine %s is dead: %s", tenant.engine_id, cause)

    def _release(self, tenant: Tenant) -> None:
        row = tenant.row
        logger.info("row %d of engine %s is free, %d bytes back", row.index, tenant.engine_id, tenant.held_bytes)
        for role in tenant.watched:
            self._exits.remove((row.index, role))
        del self._tenants[row.index]
        for rank in range(MAX_WORKERS):  # of an engine that was killed
            for segment in segments_of(self.board.path, row.index, rank):
                segment.unlink(missing_ok=True)
        for segment in tenant.segments:
            segment.unlink(missing_ok=True)
        row.clear()

    def _plan(self) -> None:
        """Plan with what the board says now, and issue what changed."""
        board, staying = self.board, [tenant for tenant in self.tenants if tenant.stays]
        starts = choose_starts(list(self._stakes().values()), board.budget_bytes, board.weights_bytes)
        reserved_bytes = sum(tenant.held_bytes for tenant in self.tenants if not tenant.stays)
        # Those of engines that are to start, too: they are granted nothing before there is room for their weights.
        reserved_bytes += excess_bytes(sum(tenant.weights_bytes for tenant in self.tenants), board.weights_bytes)
        claims = [tenant.claim(tenant.engine_id in starts) for tenant in staying]
        decisions = plan_leases(claims, board.budget_bytes, reserved_bytes)
        for tenant, decision in zip(staying, decisions, strict=True):
            tenant.issue(decision)

    def _press(self) -> bool:
        """Take a pressure sample of each engine and of the device; True when a level changed."""
        before = [self.pressure.level, *(tenant.pressure.level for tenant in self.tenants)]
        for tenant in self.tenants:
            tenant.press()
        wanted_bytes = sum(tenant.wanted_bytes for tenant in self.tenants if tenant.stays)
        self.pressure = self.pressure.sampled(usage_ratio(wanted_bytes, self.board.budget_bytes))
        return before != [self.pressure.level, *(tenant.pressure.level for tenant in self.tenants)]

    def _find(self, engine_id: str) -> Tenant | None:
        return next((one for one in self.tenants if one.engine_id == engine_id and one.stays), None)

    def _stakes(self) -> dict[str, Stake]:
        return {one.engine_id: one.stake() for one in self.tenants if one.stays}

    def _check(self, stakes: list[Stake]) -> None:
        check_stakes(stakes, self.board.budget_bytes, self.board.weights_bytes)
