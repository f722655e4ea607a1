"""The models that a cluster is meant to serve, and what may be changed of them. Pure: every change makes a new set.

    ADMITTED ----> STARTING ----------> SERVING ----> DRAINING ----------> LEAVING ----> gone
      to be         replicas start,      requests      new requests are     its replicas
      deployed      ingresses build      are taken     refused, others end  end

An engine registers with what it must have: a guarantee of one longest request, and a ceiling of its KV tensor. Other
limits are set beside that (``Limits``), so that a replica which takes another's place always fits.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from cluster.config import ModelConfig
from cluster.device import Device
from cluster.sizing import PACED_BYTES, mib
from memory_agent.errors import SettingsError
from memory_agent.lease_board import MAX_ROWS
from replicas.spec import EngineSpec


class UnknownModelError(SettingsError):
    """No model of that name is in the set."""


class ModelConflictError(SettingsError):
    """The set as it is now does not allow the change. The message says what would."""


class ModelPhase(StrEnum):
    """Where a model is on its way through the cluster."""

    ADMITTED = "admitted"
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    LEAVING = "leaving"


_STAYS = (ModelPhase.ADMITTED, ModelPhase.STARTING, ModelPhase.SERVING)


@dataclass(frozen=True)
class Limits:
    """What each replica of a model can always get, and may hold at most; bytes of the device's budget."""

    guarantee_bytes: int
    ceiling_bytes: int


@dataclass(frozen=True)
class ModelEntry:
    """One model. limits: None leaves those with which its engines register."""

    config: ModelConfig
    spec: EngineSpec
    limits: Limits | None = None
    phase: ModelPhase = ModelPhase.ADMITTED

    @property
    def name(self) -> str:
        return self.spec.model_name

    @property
    def own_limits(self) -> Limits:
        """Those with which its engines register."""
        return Limits(self.spec.guarantee_bytes, self.spec.ceiling_bytes)

    @property
    def limits_now(self) -> Limits:
        return self.limits or self.own_limits

    @property
    def stays(self) -> bool:
        """It is served, or is going to be."""
        return self.phase in _STAYS

    @property
    def promised_bytes(self) -> int:
        """Guarantees of all its replicas."""
        return self.config.most_replicas * self.limits_now.guarantee_bytes if self.spec.elastic else 0

    def fixed_bytes(self, device: Device) -> int:
        """Processes and weights of all its replicas on the device; and KV memory and starts where these are not
        elastic."""
        spec = self.spec
        if spec.paced_tokens_per_s is not None:
            return self.config.most_replicas * PACED_BYTES
        static = 0 if spec.elastic else spec.kv_ceiling_bytes + spec.spike_bytes
        reserve = device.step_reserve_bytes(
            spec.max_num_batched_tokens, spec.token_bytes, spec.max_num_seqs, spec.row_bytes
        )
        return self.config.most_replicas * (device.replica_bytes + reserve + spec.weights_bytes + static)


def new_entry(config: ModelConfig, spec: EngineSpec, guarantee_bytes: int) -> ModelEntry:
    """An entry for a model that has been sized. guarantee_bytes: of one replica, at least the engine's own."""
    if not spec.elastic or guarantee_bytes <= spec.guarantee_bytes or config.guarantee is None:
        return ModelEntry(config, spec)
    return ModelEntry(config, spec, Limits(guarantee_bytes, spec.ceiling_bytes))


@dataclass(frozen=True)
class ModelSet:
    """Every model of a cluster, in the order they came, and the budget that the elastic ones share."""

    entries: tuple[ModelEntry, ...] = ()
    budget_bytes: int = 0
    names: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", frozenset(entry.name for entry in self.entries))

    @property
    def promised_bytes(self) -> int:
        return sum(entry.promised_bytes for entry in self.entries)

    @property
    def weights_bytes(self) -> int:
        """Of all elastic replicas, beside the budget."""
        return sum(
            entry.config.most_replicas * entry.spec.weights_bytes for entry in self.entries if entry.spec.elastic
        )

    @property
    def start_bytes(self) -> int:
        """Of the budget, what the guarantees leave to starts, so that each engine can start when all others have
        theirs."""
        return max((entry.spec.spike_bytes for entry in self.entries if entry.spec.elastic), default=0)

    @property
    def replicas(self) -> int:
        return sum(entry.config.most_replicas for entry in self.entries)

    def get(self, name: str) -> ModelEntry:
        """Raises UnknownModelError, which names the models there are."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise self.unknown(name)

    def unknown(self, name: str) -> UnknownModelError:
        """What to raise for a name that is not in the set."""
        known = ", ".join(entry.name for entry in self.entries) or "none"
        return UnknownModelError(f"no model {name!r} in this cluster; its models are: {known}")

    def check_new(self, config: ModelConfig) -> None:
        """Raises ModelConflictError where a model cannot be added whatever its size."""
        if config.name in self.names:
            there = self.get(config.name)
            raise ModelConflictError(
                f"model {config.name!r} is there already ({there.phase}); add it under another name with --name"
                if there.stays
                else f"model {config.name!r} is being removed; add it again when that is done"
            )
        rows = sum(entry.config.most_replicas for entry in self.entries if entry.spec.elastic)
        if config.elastic and rows + config.most_replicas > MAX_ROWS:
            raise ModelConflictError(
                f"{rows} elastic replicas share this device and at most {MAX_ROWS} can; "
                f"{MAX_ROWS - rows} more fit, {config.most_replicas} were asked for"
            )

    def admit(self, entry: ModelEntry, budget_bytes: int) -> "ModelSet":
        """With one more model, and the budget that all share from then on. Raises ModelConflictError."""
        self.check_new(entry.config)
        return replace(self, entries=(*self.entries, entry), budget_bytes=budget_bytes)

    def withdraw(self, name: str) -> "ModelSet":
        """With the model on its way out; again changes nothing. Raises UnknownModelError, and ModelConflictError where
        no other model serves."""
        entry = self.get(name)
        if not entry.stays:
            return self
        if not any(other.phase is ModelPhase.SERVING for other in self.entries if other is not entry):
            raise ModelConflictError(
                f"{name} cannot be removed, because no other model serves: add another one first with `ellm models "
                "add`, or stop the cluster with Ctrl-C"
            )
        return self.moved(name, ModelPhase.DRAINING)

    def limit(self, name: str, limits: Limits) -> "ModelSet":
        """With other limits for each replica of a model. Raises UnknownModelError, and SettingsError for limits that
        cannot hold: with the numbers that can."""
        entry = self.get(name)
        others_bytes = self.promised_bytes - entry.promised_bytes
        _check_limits(entry, limits, self.budget_bytes, others_bytes, self.start_bytes)
        return self._with(replace(entry, limits=limits))

    def unlimited(self, name: str) -> "ModelSet":
        """With the limits with which the model's engines register. Raises UnknownModelError."""
        return self._with(replace(self.get(name), limits=None))

    def moved(self, name: str, phase: ModelPhase) -> "ModelSet":
        """With the model in another phase. Raises UnknownModelError."""
        return self._with(replace(self.get(name), phase=phase))

    def without(self, name: str) -> "ModelSet":
        return replace(self, entries=tuple(entry for entry in self.entries if entry.name != name))

    def _with(self, entry: ModelEntry) -> "ModelSet":
        return replace(self, entries=tuple(entry if one.name == entry.name else one for one in self.entries))

    def to_json(self) -> str:
        """Text from which ``set_from_json`` makes an equal set."""
        entries = [
            {
                "config": entry.config.model_dump(),
                "spec": asdict(entry.spec),
                "limits": asdict(entry.limits) if entry.limits else None,
                "phase": entry.phase,
            }
            for entry in self.entries
        ]
        return json.dumps({"budget_bytes": self.budget_bytes, "entries": entries})


def set_from_json(text: str) -> ModelSet:
    """Raises KeyError, TypeError or ValueError for a text that ``to_json`` did not write."""
    tree = json.loads(text)
    return ModelSet(tuple(map(_entry, tree["entries"])), tree["budget_bytes"])


def _entry(tree: dict[str, Any]) -> ModelEntry:
    limits = Limits(**tree["limits"]) if tree["limits"] else None
    config, spec = ModelConfig.model_validate(tree["config"]), EngineSpec(**tree["spec"])
    return ModelEntry(config, spec, limits, ModelPhase(tree["phase"]))


def _check_limits(entry: ModelEntry, limits: Limits, budget_bytes: int, others_bytes: int, start_bytes: int) -> None:
    """others_bytes: what is promised to other models; start_bytes: what has to be left to the start of an engine."""
    name, spec, replicas = entry.name, entry.spec, entry.config.most_replicas
    guarantee, ceiling = limits.guarantee_bytes, limits.ceiling_bytes
    if not spec.elastic:
        raise SettingsError(
            f"{name} is not elastic, its KV memory was fixed at its start: remove it and add it again with another size"
        )
    problems: Sequence[tuple[bool, str]] = (
        (
            guarantee < spec.guarantee_bytes,
            f"a guarantee of {mib(guarantee)} is below what one longest request needs; at least "
            f"{mib(spec.guarantee_bytes)} fit",
        ),
        (
            ceiling > budget_bytes,
            f"a ceiling of {mib(ceiling)} is above the {_floor(budget_bytes)} that all models of this device share; at "
            f"most {_floor(min(budget_bytes, spec.ceiling_bytes))} fit",
        ),
        (
            ceiling > spec.ceiling_bytes,
            f"a ceiling of {mib(ceiling)} is above the {_floor(spec.ceiling_bytes)} of addresses that its replicas "
            "reserved when they started; at most that fits, or remove it and add it again with a higher --ceiling",
        ),
        (
            guarantee > ceiling,
            f"a guarantee of {mib(guarantee)} is above its ceiling of {_floor(ceiling)}; lower one or raise the other",
        ),
        (
            replicas * guarantee + others_bytes + start_bytes > budget_bytes,
            f"a guarantee of {mib(guarantee)} for each of its {replicas} replicas does not fit: of the "
            f"{_floor(budget_bytes)} that all models share, {mib(others_bytes)} are promised to others, and the start "
            f"of an engine needs {mib(start_bytes)}; at most "
            f"{_floor((budget_bytes - others_bytes - start_bytes) // replicas)} fit",
        ),
    )
    for wrong, why in problems:
        if wrong:
            raise SettingsError(f"{name}: {why}")


def _floor(value: int) -> str:
    """Rounded down, so that a value copied from a message still fits below it."""
    return mib(value // 2**20 * 2**20)
