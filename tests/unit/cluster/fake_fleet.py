"""A cluster that is played: what ``ModelKeeper`` asks of it happens in this process."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from cluster.model_keeper import FleetAwayError, ModelKeeper
from cluster.model_plan import AppState, IngressState
from cluster.model_set import Limits, ModelEntry, ModelSet
from cluster.sizing import GIB
from memory_agent.errors import SettingsError
from memory_agent.reports import DeviceReport


@dataclass
class FakeFleet:
    """A cluster in which what is asked for happens at once, unless ``replicas_start`` or ``api_follows`` is False."""

    budget_bytes: int = GIB
    weights_bytes: int = 0
    free: int = 24 * GIB
    replicas_start: bool = True
    api_follows: bool = True
    away: bool = False
    failing: str | None = None
    running: dict[str, AppState] = field(default_factory=dict)
    in_flight: dict[str, int] = field(default_factory=dict)
    engines: dict[str, Any] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    keeper: ModelKeeper | None = None

    async def apps(self) -> Mapping[str, AppState]:
        if self.away:
            raise FleetAwayError("Ray Serve is away")
        return dict(self.running)

    async def deploy(self, entry: ModelEntry, models: ModelSet) -> None:
        self.calls.append(f"deploy {entry.name}, of {models.replicas}")
        self.running[entry.name] = AppState(running=self.replicas_start and not self.failing, failed=self.failing)
        for number in range(entry.config.replicas):
            self.engine(f"{entry.name}-{number}", entry.name, entry.own_limits)

    def engine(self, engine_id: str, model: str, limits: Limits) -> None:
        self.engines[engine_id] = SimpleNamespace(
            engine_id=engine_id, model=model, state="LIVE", guarantee_bytes=limits.guarantee_bytes,
            ceiling_bytes=limits.ceiling_bytes, limit_bytes=7, held_bytes_os=5, activation_held_bytes=0, running=1,
            waiting=2, start_bytes=0, waits_to_start=False,
        )  # fmt: skip

    async def delete(self, name: str) -> None:
        self.calls.append(f"delete {name}")
        del self.running[name]
        self.engines = {key: one for key, one in self.engines.items() if one.model != name}

    async def ingresses(self) -> list[IngressState]:
        assert self.keeper is not None
        if not self.api_follows:
            return [IngressState(in_flight=self.in_flight)]
        routed = {one.name for one in self.keeper.models.entries if one.stays}
        return [IngressState(frozenset(routed), dict.fromkeys(routed, 0) | self.in_flight)]

    async def device(self, models: ModelSet) -> DeviceReport:
        self.budget_bytes, self.weights_bytes = models.budget_bytes, models.weights_bytes
        report: Any = SimpleNamespace(engines=tuple(self.engines.values()), held_bytes_os=5 * len(self.engines))
        return report  # type: ignore[no-any-return]

    async def set_limits(self, engine_id: str, limits: Limits) -> None:
        engine = self.engines[engine_id]
        others = sum(one.guarantee_bytes for one in self.engines.values() if one is not engine)
        if others + limits.guarantee_bytes > self.budget_bytes:
            raise SettingsError("the guarantees do not fit")
        self.calls.append(f"limit {engine_id}")
        engine.guarantee_bytes, engine.ceiling_bytes = limits.guarantee_bytes, limits.ceiling_bytes

    def free_bytes(self) -> int:
        return self.free
