"""Pure arithmetic: whether one more model fits beside those that run, and what its engines are started with.

    free memory now
    |<- still lent: budget - held ->|<- being started ->|<---- new: processes, weights ---->|<- more budget ->|

The budget of the running engines stays theirs. It grows for the new model only where its size was left to the cluster.
Beside all guarantees it has room for the start of any engine.
"""

from dataclasses import dataclass

from cluster.config import ClusterConfig, ModelConfig
from cluster.device import HOST, Device
from cluster.models import ModelFacts
from cluster.sizing import (
    EngineSizes,
    automatic_budget,
    check_guarantee,
    down,
    engine_spec,
    gib,
    longest_request,
    mib,
    start_room,
)
from memory_agent.errors import SettingsError
from memory_agent.lease_board import LIMIT_UNIT_BYTES
from replicas.spec import EngineSpec


@dataclass(frozen=True)
class Room:
    """What the device and the running engines leave to a new model. All in bytes.

    Attributes:
        free_bytes: that the device can give now.
        pending_bytes: processes and weights of engines that are being started, and may not have taken them yet.
        held_bytes: of the budget, held by engines now; guaranteed_bytes: of the budget, promised to engines.
        start_bytes: of the budget, what their starts need at most beside the guarantees.
        budget_bytes: that the running engines share; 0 where none is elastic.
    """

    free_bytes: int
    pending_bytes: int
    held_bytes: int
    guaranteed_bytes: int
    start_bytes: int
    budget_bytes: int

    def unpromised_bytes(self, engine: EngineSizes) -> int:
        """Of the budget, what neither a guarantee nor a start needs where ``engine`` is there; below 0 where that is
        missing."""
        start = max(self.start_bytes, start_room([engine] if engine.model.elastic else []))
        return self.budget_bytes - self.guaranteed_bytes - start

    @property
    def spare_bytes(self) -> int:
        """Free when everything promised has been taken."""
        return self.free_bytes - self.pending_bytes - max(0, self.budget_bytes - self.held_bytes)


@dataclass(frozen=True)
class Addition:
    """A model that fits: its engines' settings, what each is guaranteed, and the budget that all share from then on."""

    spec: EngineSpec
    guarantee_bytes: int
    budget_bytes: int


def plan_addition(
    config: ClusterConfig, model: ModelConfig, facts: ModelFacts, room: Room, device: Device = HOST
) -> Addition:
    """Sizes of ``model`` beside what runs; ``config`` says how the memory is shared.

    Raises SettingsError where the memory, the budget or a ceiling is too small: with what is needed and what would fit.
    """
    engine = EngineSizes(model, facts, config.memory, config.slo[0], device)
    check_guarantee(engine)
    fixed = model.most_replicas * engine.fixed_bytes
    promised = model.most_replicas * engine.guarantee_bytes if model.elastic else 0
    grows = config.memory.budget is None
    missing = max(0, promised - room.unpromised_bytes(engine)) if model.elastic else 0
    if fixed + (missing if grows else 0) > room.spare_bytes:
        raise SettingsError(_too_little(engine, room, grows))
    if missing and not grows:
        raise SettingsError(_over_budget(engine, room))
    budget = room.budget_bytes
    if grows and model.elastic:
        wanted = automatic_budget(room.guaranteed_bytes + promised, max(room.start_bytes, start_room([engine])))
        budget = max(budget, min(wanted, down(budget + room.spare_bytes - fixed, LIMIT_UNIT_BYTES)))
    spec = engine_spec(engine, budget, config.memory.rest)
    return Addition(spec, engine.guarantee_bytes if model.elastic else 0, budget)


def _too_little(engine: EngineSizes, room: Room, grows: bool) -> str:
    model, spare = engine.model, max(0, room.spare_bytes)
    kv = engine.guarantee_bytes if model.elastic else 0
    unpromised = room.unpromised_bytes(engine)
    options = []
    if replicas := _most_replicas(engine, spare, unpromised, grows):
        options.append(f"set {'max_replicas' if model.scales else 'replicas'} to {replicas}")
    left = spare - model.most_replicas * engine.fixed_bytes
    tokens = longest_request([engine], left + unpromised) if grows and model.elastic and left >= 0 else 0
    if tokens > 0:
        options.append(f"set max_model_len to at most {tokens}")
    remedy = (
        f"What would fit: {', or '.join(options)}."
        if options
        else "Not even one replica fits: remove another model, free memory, or add a smaller one."
    )
    return (
        f"too little memory for {model.name}: {model.most_replicas} x {gib(engine.fixed_bytes + kv)} are needed, for "
        f"process, weights and one longest request; {gib(spare)} are free beside what the running models may take "
        f"({gib(room.budget_bytes)} of budget, {gib(max(0, unpromised))} of it promised to none). {remedy}"
    )


def _most_replicas(engine: EngineSizes, spare: int, unpromised: int, grows: bool) -> int:
    """Most replicas that fit, fewer than were asked for; 0 where none does."""

    def fits(replicas: int) -> bool:
        promised = replicas * engine.guarantee_bytes
        missing = max(0, promised - unpromised) if engine.model.elastic else 0
        return replicas * engine.fixed_bytes + (missing if grows else 0) <= spare and (grows or missing == 0)

    return next((replicas for replicas in range(engine.model.most_replicas - 1, 0, -1) if fits(replicas)), 0)


def _over_budget(engine: EngineSizes, room: Room) -> str:
    model, unpromised = engine.model, room.unpromised_bytes(engine)
    options = []
    if replicas := _most_replicas(engine, max(0, room.spare_bytes), unpromised, grows=False):
        options.append(f"set {'max_replicas' if model.scales else 'replicas'} to {replicas}")
    if (tokens := longest_request([engine], unpromised)) > 0:
        options.append(f"set max_model_len to at most {tokens}")
    options.append("lower the guarantee of another model, or remove it")
    return (
        f"memory.budget is {mib(room.budget_bytes)}, of which {mib(room.guaranteed_bytes)} are promised, and the start "
        f"of an engine needs {mib(room.budget_bytes - room.guaranteed_bytes - unpromised)}; "
        f"{model.most_replicas} x {mib(engine.guarantee_bytes)} for {model.name} do not fit into the rest. "
        f"What would fit: {'; or '.join(options)}."
    )
