"""Makes the report of one device: the board's words beside what the operating system says."""

from memory_agent.lease_board import NO_FD, AgentWord, EngineWord, LeaseBoard, ReplicaWord, Row
from memory_agent.lease_keeper import LeaseKeeper
from memory_agent.processes import file_bytes, resident_bytes
from memory_agent.reports import DeviceReport, EngineReport, PressureLevel
from memory_agent.tenant import Tenant


class DeviceReporter:
    """Numbers the reports of one agent life.

    node: Ray's node id; epoch_ns: start of this life, so that (epoch_ns, sequence) orders reports across lives.
    """

    def __init__(self, node: str, device: str, pid: int, epoch_ns: int) -> None:
        self._node = node
        self._device = device
        self._pid = pid
        self._epoch_ns = epoch_ns
        self._sequence = 0
        self._levels: dict[str | None, tuple[PressureLevel, float]] = {}
        """Of each engine, and of the device under None: its level, and since when it has it."""

    def sample(self, keeper: LeaseKeeper, wall_s: float) -> DeviceReport:
        """One report. Asks the kernel twice or more for each engine: for reports, not for every tick."""
        self._sequence += 1
        board: LeaseBoard = keeper.board
        levels = {None: keeper.pressure.level} | {one.engine_id: one.pressure.level for one in keeper.tenants}
        known = {name: self._levels.get(name, (None, wall_s)) for name in levels}
        self._levels = {
            name: (level, known[name][1] if known[name][0] == level else wall_s) for name, level in levels.items()
        }
        return DeviceReport(
            node=self._node,
            device=self._device,
            agent_pid=self._pid,
            agent_epoch_ns=self._epoch_ns,
            sequence=self._sequence,
            taken_at_s=wall_s,
            budget_bytes=board.budget_bytes,
            weights_bytes=board.weights_bytes,
            pressure=keeper.pressure.level,
            pressure_since_s=self._levels[None][1],
            engines=tuple(sample_engine(tenant, self._levels[tenant.engine_id][1]) for tenant in keeper.tenants),
            dead_engines=board.dead_engines,
        )


def sample_engine(tenant: Tenant, pressure_since_s: float = 0.0) -> EngineReport:
    """One engine as its row and the operating system show it now. pressure_since_s: Unix time, 0 where nobody asks."""
    row = tenant.row
    lease = row.lease
    workers = row.workers
    block_bytes = row.get(EngineWord.BLOCK_BYTES)
    blocks_ceiling = row.get(EngineWord.BLOCKS_CEILING)
    reachable_blocks = min(lease.limit_bytes // block_bytes, blocks_ceiling) if block_bytes else 0
    reachable_bytes = reachable_blocks * block_bytes
    used_bytes = row.get(EngineWord.USED_BYTES)
    pid = row.get(EngineWord.PID)
    stores_declined, loads_declined = (
        row.get(word) for word in (EngineWord.HOST_STORES_DECLINED, EngineWord.HOST_LOADS_DECLINED)
    )
    return EngineReport(
        engine_id=tenant.engine_id,
        model=tenant.model,
        pid=pid,
        state=tenant.state.name,
        limit_bytes=lease.limit_bytes,
        lease_revision=lease.revision,
        applied_revision=row.get(EngineWord.APPLIED_REVISION),
        guarantee_bytes=tenant.guarantee_bytes,
        ceiling_bytes=row.get(AgentWord.CEILING_BYTES),
        weights_bytes=tenant.weights_bytes,
        start_bytes=tenant.start_bytes,
        held_bytes_os=_held_bytes(row),
        committed_bytes=_committed_bytes(row),
        activation_bytes=row.get(EngineWord.ACTIVATION_BYTES),
        activation_held_bytes=row.get(EngineWord.ACTIVATION_HELD_BYTES),
        token_budget=row.get(EngineWord.TOKEN_BUDGET),
        used_bytes=used_bytes,
        demand_bytes=row.get(EngineWord.DEMAND_BYTES),
        rss_bytes=sum(resident_bytes(one) for one in {pid, *(worker for worker, _ in workers)} if one),
        running=row.get(EngineWord.RUNNING),
        waiting=row.get(EngineWord.WAITING),
        preemptions=row.get(EngineWord.PREEMPTIONS),
        host_bytes=row.get(EngineWord.HOST_BYTES),
        host_stored_blocks=row.get(EngineWord.HOST_STORED_BLOCKS),
        host_loaded_blocks=row.get(EngineWord.HOST_LOADED_BLOCKS),
        host_capacity_bytes=row.get(EngineWord.HOST_CAPACITY_BYTES),
        host_hits=row.get(EngineWord.HOST_HITS),
        host_misses=row.get(EngineWord.HOST_MISSES),
        host_declined_blocks=stores_declined + loads_declined,
        host_stores_moved=row.get(EngineWord.HOST_STORES_MOVED),
        host_stores_probed=row.get(EngineWord.HOST_STORES_PROBED),
        host_stores_declined=stores_declined,
        host_loads_moved=row.get(EngineWord.HOST_LOADS_MOVED),
        host_loads_probed=row.get(EngineWord.HOST_LOADS_PROBED),
        host_loads_declined=loads_declined,
        host_evicted_blocks=row.get(EngineWord.HOST_EVICTED_BLOCKS),
        host_damaged_blocks=row.get(EngineWord.HOST_DAMAGED_BLOCKS),
        host_stored_tails=row.get(EngineWord.HOST_STORED_TAILS),
        host_loaded_tails=row.get(EngineWord.HOST_LOADED_TAILS),
        host_logical_bytes=row.get(EngineWord.HOST_LOGICAL_BYTES),
        set_aside=row.get(EngineWord.SET_ASIDE),
        inflate_count=row.get(EngineWord.INFLATE_COUNT),
        inflate_bytes=row.get(EngineWord.INFLATE_BYTES),
        inflate_s=row.get(EngineWord.INFLATE_NS) / 1e9,
        deflate_count=row.get(EngineWord.DEFLATE_COUNT),
        deflate_bytes=row.get(EngineWord.DEFLATE_BYTES),
        deflate_s=row.get(EngineWord.DEFLATE_NS) / 1e9,
        borrow_count=row.get(AgentWord.BORROW_COUNT),
        borrow_bytes=row.get(AgentWord.BORROW_BYTES),
        lend_count=row.get(AgentWord.LEND_COUNT),
        lend_bytes=row.get(AgentWord.LEND_BYTES),
        map_failures=row.get(EngineWord.MAP_FAILURES),
        conservation_failures=row.get(EngineWord.CONSERVATION_FAILURES),
        overdue_bytes=tenant.overdue_bytes,
        blocks_mapped=row.get(EngineWord.BLOCKS_MAPPED),
        reachable_blocks=reachable_blocks,
        blocks_ceiling=blocks_ceiling,
        block_tokens=row.get(EngineWord.BLOCK_TOKENS),
        kv_usage=min(1.0, used_bytes / reachable_bytes) if reachable_bytes else 0.0,
        target_revision=row.get(ReplicaWord.TARGET_REVISION),
        token_budget_max=row.get(ReplicaWord.TOKEN_BUDGET_MAX),
        active_max=row.get(ReplicaWord.ACTIVE_MAX),
        max_num_seqs=row.get(EngineWord.MAX_NUM_SEQS),
        max_num_batched_tokens=row.get(EngineWord.MAX_NUM_BATCHED_TOKENS),
        kv_tokens=row.get(EngineWord.KV_TOKENS),
        step_s=row.get_float(EngineWord.STEP_S),
        row_s=row.get_float(EngineWord.ROW_S),
        kv_token_s=row.get_float(EngineWord.KV_TOKEN_S),
        token_s=row.get_float(EngineWord.TOKEN_S),
        pair_s=row.get_float(EngineWord.PAIR_S),
        tpot_s=row.get_float(EngineWord.TPOT_S),
        tpot_target_s=row.get_float(EngineWord.TPOT_TARGET_S),
        ttft_share=row.get_float(EngineWord.TTFT_SHARE),
        prompt_tokens=row.get_float(EngineWord.PROMPT_TOKENS),
        prompt_of_token=row.get_float(EngineWord.PROMPT_OF_TOKEN),
        prompt_rate=row.get_float(EngineWord.PROMPT_RATE),
        pressure=tenant.pressure.level,
        pressure_since_s=pressure_since_s,
    )


def _held_bytes(row: Row) -> int:
    """KV bytes by the operating system; by the engine's own count where no file backs them."""
    workers = row.workers
    if any(fd == NO_FD for _, fd in workers):
        return _committed_bytes(row)
    return sum(file_bytes(worker, fd) for worker, fd in workers)


def _committed_bytes(row: Row) -> int:
    """KV bytes by the engine's own count."""
    return max(0, row.get(EngineWord.COMMITTED_BYTES) - row.get(EngineWord.ACTIVATION_BYTES))
