"""One simulated replica: an engine model, and the reports that its memory agent would send of it."""

import math
from dataclasses import replace

from memory_agent.pressure import Pressure, usage_ratio
from memory_agent.reports import DeviceReport, EngineReport
from replicas.decode_batch import EngineRequest
from replicas.elastic_prefill import Objectives
from replicas.engine_model import EngineModel, Progress
from replicas.engine_pace import EnginePace
from replicas.engine_profile import EngineProfile
from replicas.step_time import StepTime
from replicas.targets import ReplicaTarget

_EPOCH_NS = 1


class SimReplica:
    """Alone on its device, which is one of its node's.

    Attributes:
        up: the engine runs; reporting, reachable: its node's agent sends reports, and is not cut off.
        frozen: the reports repeat the last one's numbers.
        pace: how its requests fare; its steps are not told to it.
        lent: whether requests may be sent to it: not while it drains, and not before it was started.
    """

    def __init__(self, name: str, node: str, profile: EngineProfile, prefix_tokens: int) -> None:
        self.name, self.node = name, node
        self.engine = EngineModel(profile, prefix_tokens)
        self.up = self.reporting = self.reachable = self.lent = True
        self.frozen = False
        self.pace = EnginePace()
        self._profile = profile
        self._sequence = 0
        self._pressure = Pressure()
        self._target = ReplicaTarget(0)
        self._last: EngineReport | None = None

    def apply(self, target: ReplicaTarget) -> None:
        """A newer target replaces the one it has."""
        if target.revision > self._target.revision:
            self._target = target
            self.engine.apply(target)

    def submit(self, request: EngineRequest, objectives: Objectives, now_s: float) -> None:
        """Give the engine a request."""
        self.pace.arrive(request.request_id, request.prompt_tokens, objectives, now_s)
        self.engine.submit(request, now_s)

    def take_in(self, request: EngineRequest, objectives: Objectives, now_s: float) -> EngineRequest:
        """Give the engine a request that another one has let go, and its KV; what it is here."""
        # A new one: the other engine's batch knows the old one still.
        mine = replace(request, brought=request.generated, kv_there=True)
        self.pace.arrive(mine.request_id, mine.known_tokens, objectives, now_s)
        self.pace.answer(mine.request_id, 1, now_s)
        self.engine.submit(mine, now_s)
        return mine

    def let_go(self, request: EngineRequest) -> bool:
        """See ``EngineModel.let_go``."""
        if gone := self.engine.let_go(request):
            self.pace.forget(request.request_id)
        return gone

    def advance(self) -> Progress:
        """End the engine's run of steps under way."""
        progress = self.engine.advance()
        for one in progress.started:
            self.pace.compute(one.prompt_tokens - one.hit_tokens, progress.at_s)
            self.pace.answer(one.request_id, 1, progress.at_s)
        for one in progress.finished:
            if (tokens := one.output_tokens - one.brought) > 1:
                self.pace.answer(one.request_id, tokens - 1, progress.at_s)
            self.pace.forget(one.request_id)
        return progress

    def cancel(self, request: EngineRequest) -> None:
        """Its client has gone."""
        self.pace.forget(request.request_id)
        self.engine.cancel(request)

    def drain(self) -> list[EngineRequest]:
        """The engine dies: every request it had."""
        self.up = False
        self.pace = EnginePace()
        return self.engine.drain()

    def restart(self) -> None:
        """Up again after a death; ``EngineModel.drain`` has emptied it."""
        self.up = True
        self._pressure = Pressure()
        self.engine.apply(self._target)

    def report(self, now_s: float, step_time: StepTime) -> DeviceReport:
        """What the agent sends now. ``step_time``: as learned so far."""
        self._sequence += 1
        if self._last is None or not self.frozen:
            self._last = self._engine_report(now_s, step_time)
        return DeviceReport(
            node=self.node,
            device=self.name,
            agent_pid=1,
            agent_epoch_ns=_EPOCH_NS,
            sequence=self._sequence,
            taken_at_s=now_s,
            budget_bytes=self._profile.device_bytes,
            weights_bytes=0,
            pressure=self._last.pressure,
            pressure_since_s=self._last.pressure_since_s,
            engines=(self._last,) if self.up else (),
            dead_engines=0 if self.up else 1,
        )

    def _engine_report(self, now_s: float, step_time: StepTime) -> EngineReport:
        counts, memory = self.engine.counts(), self._profile.memory
        block = memory.block_bytes
        used, held = counts.used_blocks * block, (counts.used_blocks + counts.cached_blocks) * block
        reachable = counts.reachable_blocks * block
        self._pressure = self._pressure.sampled(usage_ratio(used + counts.wanted_blocks * block, reachable))
        common = _EMPTY if self._last is None else self._last
        tpot_target_s = self.pace.tpot_target_s
        return replace(
            common,
            engine_id=self.name,
            model=self._profile.name,
            limit_bytes=self._profile.device_bytes,
            ceiling_bytes=self._profile.device_bytes,
            weights_bytes=self._profile.weights_bytes,
            held_bytes_os=held,
            committed_bytes=held,
            activation_bytes=counts.activation_bytes,
            activation_held_bytes=counts.activation_bytes,
            token_budget=counts.token_budget,
            used_bytes=used,
            demand_bytes=used + counts.wanted_blocks * block,
            running=counts.running,
            waiting=counts.waiting,
            preemptions=counts.preemptions,
            host_bytes=counts.host_bytes,
            blocks_mapped=counts.used_blocks + counts.cached_blocks,
            reachable_blocks=counts.reachable_blocks,
            blocks_ceiling=counts.reachable_blocks,
            block_tokens=memory.block_tokens,
            kv_usage=counts.used_blocks / max(1, counts.reachable_blocks),
            target_revision=self._target.revision,
            token_budget_max=self._target.token_budget_max,
            active_max=self._target.active_max,
            max_num_seqs=self._profile.max_num_seqs,
            max_num_batched_tokens=self._profile.max_num_batched_tokens,
            kv_tokens=counts.kv_tokens,
            step_s=step_time.step_s,
            row_s=step_time.row_s,
            kv_token_s=step_time.kv_token_s,
            token_s=step_time.token_s,
            pair_s=step_time.pair_s,
            tpot_s=self.pace.tpot_s(now_s),
            tpot_target_s=tpot_target_s if tpot_target_s < math.inf else 0.0,
            ttft_share=self.pace.ttft_share(now_s),
            prompt_tokens=self.pace.prompt_tokens,
            prompt_of_token=self.pace.prompt_of_token,
            prompt_rate=self.pace.prompt_rate(now_s),
            pressure=self._pressure.level,
        )


def _empty_report() -> EngineReport:
    """A report in which nothing happens."""
    words = {"engine_id": "", "model": "", "state": "READY", "pressure": Pressure().level, "kv_usage": 0.0}
    zero = {name: 0 for name in EngineReport.__dataclass_fields__ if name not in words}
    return EngineReport(**words, **zero)  # type: ignore[arg-type]  # every field has its own type's zero


_EMPTY = _empty_report()
