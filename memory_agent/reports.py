"""What the agent tells the controller. Plain frozen data: they cross processes by pickle and are shown as JSON."""

from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from typing import Any


def replica_name(engine_id: str) -> str:
    """The part of a Serve replica's unique id that people use."""
    return engine_id.rpartition("#")[2]


class PressureLevel(IntEnum):
    """How short of memory a device or an engine is."""

    NORMAL = 0
    ELEVATED = 1
    CRITICAL = 2


@dataclass(frozen=True)
class EngineReport:
    """One engine as its board row and the operating system show it.

    Attributes:
        engine_id: the Serve replica's unique id.
        start_bytes: of the budget, what its start takes until it is live, then 0: while limit_bytes is below, the start
            waits for others to give back or to have started.
        weights_bytes: charged to the engine, from its registration to the exit of its last process.
        held_bytes_os: KV bytes held, from the operating system (st_blocks of each worker's memory file). No system
            counts a GPU's for one process: there it is the engine's own count, and its workers hold the driver's free
            memory against their chunks whenever they check their books.
        committed_bytes: the engine's own count of KV bytes; differs from held_bytes_os only while a move is under way.
        activation_bytes: charged to the lease for the engine's steps; activation_held_bytes: measured after the last
            one that was reported.
        token_budget: most tokens of a step that the lease allowed last.
        used_bytes: KV bytes that requests reference now.
        host_bytes: taken in the host buffer, of host_capacity_bytes. host_..._blocks, since the start: written to it;
            loaded from it; not moved, because computing them again is cheaper; pushed out by others; not found whole,
            and computed again. host_hits, host_misses: blocks that were asked for. host_stores_..., host_loads_...:
            blocks for which break-even has decided so.
        host_..._tails: of the blocks written and loaded the last, partly filled ones of preempted requests.
        host_logical_bytes: of requests that may be set aside for prompts; set_aside: requests that were, since the
            start.
        rss_bytes: resident bytes of the engine's processes.
        inflate_..., deflate_...: moves of KV memory since the start, their bytes, and the time they took.
        borrow_count, borrow_bytes: raises of the limit above the guarantee since the registration; lend_...: cuts below
            it.
        map_failures: moves that a worker refused for lack of memory.
        conservation_failures: checks that found the engine's count of its memory at odds with what is mapped: a defect.
        overdue_bytes: owed to other engines for longer than a reclaim may take; its processes are stopped or very slow.
        pressure: of this engine: its used and demanded bytes against what it can reach. pressure_since_s: wall-clock
            time from which it has had this level, as far as this life of the agent knows.
        reachable_blocks: KV blocks inside the current lease; blocks_ceiling: KV blocks of the virtual tensor.
        kv_usage: used share of the reachable capacity, 0 to 1.
        target_revision, token_budget_max, active_max: of the controller's target that the replica has; 0 for none.
        max_num_seqs, max_num_batched_tokens: the engine's own settings, which no target lets it go beyond.
        kv_tokens: that running requests have computed or loaded, over all of them.
        step_s, row_s, kv_token_s, token_s, pair_s: parts of a step's time, seconds, as ``replicas.step_time`` names
            them; all 0 until the engine has learned them.
        tpot_s: time per token after the first that one answer in ten exceeds, lately; tpot_target_s: the tightest
            objective for it that a request of the engine has. 0 where there is none.
        ttft_share: of its objective for the first token, what a request that waits for it has used, the most of all.
        prompt_tokens: of a prompt, mean of the recent ones; prompt_of_token: of the prompt that a prompt's token is in,
            mean over their tokens; prompt_rate: of their tokens computed a second, over about the last half minute.
    """

    engine_id: str
    model: str
    pid: int
    state: str
    limit_bytes: int
    lease_revision: int
    applied_revision: int
    guarantee_bytes: int
    ceiling_bytes: int
    weights_bytes: int
    start_bytes: int
    held_bytes_os: int
    committed_bytes: int
    activation_bytes: int
    activation_held_bytes: int
    token_budget: int
    used_bytes: int
    demand_bytes: int
    rss_bytes: int
    running: int
    waiting: int
    preemptions: int
    host_bytes: int
    host_stored_blocks: int
    host_loaded_blocks: int
    host_capacity_bytes: int
    host_hits: int
    host_misses: int
    host_declined_blocks: int
    host_stores_moved: int
    host_stores_probed: int
    host_stores_declined: int
    host_loads_moved: int
    host_loads_probed: int
    host_loads_declined: int
    host_evicted_blocks: int
    host_damaged_blocks: int
    host_stored_tails: int
    host_loaded_tails: int
    host_logical_bytes: int
    set_aside: int
    inflate_count: int
    inflate_bytes: int
    inflate_s: float
    deflate_count: int
    deflate_bytes: int
    deflate_s: float
    borrow_count: int
    borrow_bytes: int
    lend_count: int
    lend_bytes: int
    map_failures: int
    conservation_failures: int
    overdue_bytes: int
    blocks_mapped: int
    reachable_blocks: int
    blocks_ceiling: int
    block_tokens: int
    kv_usage: float
    target_revision: int
    token_budget_max: int
    active_max: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_tokens: int
    step_s: float
    row_s: float
    kv_token_s: float
    token_s: float
    pair_s: float
    tpot_s: float
    tpot_target_s: float
    ttft_share: float
    prompt_tokens: float
    prompt_of_token: float
    prompt_rate: float
    pressure: PressureLevel
    pressure_since_s: float

    @property
    def kv_cached_bytes(self) -> int:
        """KV memory held that no request references."""
        return max(0, self.held_bytes_os - self.used_bytes)

    @property
    def waits_to_start(self) -> bool:
        """Its processes are not started yet, for lack of memory."""
        return self.limit_bytes < self.start_bytes


@dataclass(frozen=True)
class DeviceReport:
    """One device at one moment.

    Attributes:
        taken_at_s: wall-clock time of the sample, for people; sequence: grows by one with each report of an agent life.
        agent_epoch_ns: start time of this agent life; (agent_epoch_ns, sequence) orders reports of a device.
        budget_bytes: KV bytes the engines of this device share; weights_bytes: set aside beside it for their weights.
        pressure, pressure_since_s: of the device, as an engine's.
    """

    node: str
    device: str
    agent_pid: int
    agent_epoch_ns: int
    sequence: int
    taken_at_s: float
    budget_bytes: int
    weights_bytes: int
    pressure: PressureLevel
    pressure_since_s: float
    engines: tuple[EngineReport, ...]
    dead_engines: int

    @property
    def weights_over_bytes(self) -> int:
        """Of the budget, what the engines' weights take because it is beyond what is set aside for them."""
        return max(0, sum(engine.weights_bytes for engine in self.engines) - self.weights_bytes)

    @property
    def held_bytes_os(self) -> int:
        return sum(engine.held_bytes_os for engine in self.engines)

    @property
    def bytes_by_owner(self) -> dict[str, int]:
        """All but ``weights`` and ``host_buffer`` sum to the budget, unless more is held than the budget allows (it was
        lowered a moment ago) or weights take of it what is not set aside for them."""
        used = sum(engine.used_bytes for engine in self.engines)
        held = self.held_bytes_os
        activations = sum(engine.activation_held_bytes for engine in self.engines)
        starts = sum(engine.start_bytes for engine in self.engines if not engine.waits_to_start)
        taken = max(held, used) + activations + starts + self.weights_over_bytes
        return {
            "weights": sum(engine.weights_bytes for engine in self.engines),
            "kv_used": used,
            "kv_cached": max(0, held - used),
            "activation": activations,
            "start": starts,
            "free": max(0, self.budget_bytes - taken),
            "host_buffer": sum(engine.host_bytes for engine in self.engines),
        }

    def same_numbers(self, other: "DeviceReport") -> bool:
        """Whether only the time of the sample tells the two apart."""
        return replace(self, sequence=other.sequence, taken_at_s=other.taken_at_s) == other

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; enums by name."""
        out = asdict(self)
        out["pressure"] = self.pressure.name
        for engine, row in zip(self.engines, out["engines"], strict=True):
            row["pressure"] = engine.pressure.name
        return out
