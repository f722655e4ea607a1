"""One simulated replica: an engine model, and the reports that its memory agent would send of it."""

from dataclasses import replace

from memory_agent.pressure import Pressure, usage_ratio
from memory_agent.reports import DeviceReport, EngineReport
from replicas.engine_model import EngineModel
from replicas.engine_profile import EngineProfile
from replicas.targets import ReplicaTarget

_EPOCH_NS = 1


class SimReplica:
    """Alone on its device, which is one of its node's.

    Attributes:
        up: the engine runs; reporting, reachable: its node's agent sends reports, and is not cut off.
        frozen: the reports repeat the last one's numbers.
        lent: whether requests may be sent to it: not while it drains, and not before it was started.
    """

    def __init__(self, name: str, node: str, profile: EngineProfile, prefix_tokens: int) -> None:
        self.name, self.node = name, node
        self.engine = EngineModel(profile, prefix_tokens)
        self.up = self.reporting = self.reachable = self.lent = True
        self.frozen = False
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

    def restart(self) -> None:
        """Up again after a death; ``EngineModel.drain`` has emptied it."""
        self.up = True
        self._pressure = Pressure()
        self.engine.apply(self._target)

    def report(self, now_s: float) -> DeviceReport:
        """What the agent sends now."""
        self._sequence += 1
        if self._last is None or not self.frozen:
            self._last = self._engine_report()
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
            engines=(self._last,) if self.up else (),
            dead_engines=0 if self.up else 1,
        )

    def _engine_report(self) -> EngineReport:
        counts, memory = self.engine.counts(), self._profile.memory
        block = memory.block_bytes
        used, held = counts.used_blocks * block, (counts.used_blocks + counts.cached_blocks) * block
        reachable = counts.reachable_blocks * block
        self._pressure = self._pressure.sampled(usage_ratio(used + counts.wanted_blocks * block, reachable))
        common = _EMPTY if self._last is None else self._last
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
            pressure=self._pressure.level,
        )


def _empty_report() -> EngineReport:
    """A report in which nothing happens."""
    words = {"engine_id": "", "model": "", "state": "READY", "pressure": Pressure().level, "kv_usage": 0.0}
    zero = {name: 0 for name in EngineReport.__dataclass_fields__ if name not in words}
    return EngineReport(**words, **zero)  # type: ignore[arg-type]  # every field has its own type's zero


_EMPTY = _empty_report()
