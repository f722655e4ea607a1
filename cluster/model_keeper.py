"""Keeps the models of a running cluster: what is meant to be served, and the steps on the way there.

Hard state is the model set alone, in a file that is replaced as a whole. Whoever opens the file goes on from it: each
tick looks at what is there (``Fleet``), and takes the next step of every model (``cluster.model_plan``).
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from cluster.addition import Room, plan_addition
from cluster.config import ClusterConfig, ModelConfig
from cluster.default_model import DefaultModelError
from cluster.device import HOST, Device
from cluster.model_plan import Action, AppState, IngressState, next_step
from cluster.model_set import (
    Limits,
    ModelConflictError,
    ModelEntry,
    ModelPhase,
    ModelSet,
    new_entry,
    set_from_json,
)
from cluster.model_story import ModelStory
from cluster.models import ModelFacts, read_facts, resolve_source
from cluster.sizing import GIB, MIB, mib
from memory_agent.errors import SettingsError
from memory_agent.reports import DeviceReport, EngineReport

logger = logging.getLogger(__name__)

_UNDER_WAY = (ModelPhase.ADMITTED, ModelPhase.STARTING)


class FleetAwayError(Exception):
    """A part of the cluster does not answer now. Look again later."""


class Fleet(Protocol):
    """The running cluster, as far as models are concerned. Every method raises FleetAwayError where who has to answer
    is away; each may run twice."""

    async def apps(self) -> Mapping[str, AppState]:
        """Ray Serve's applications, by model."""

    async def deploy(self, entry: ModelEntry, models: ModelSet) -> None:
        """Start the replicas of one of ``models``; does not wait for them."""

    async def delete(self, name: str) -> None:
        """End the replicas of a model; does not wait for them."""

    async def ingresses(self) -> list[IngressState]:
        """The state of every ingress process; none where one of them does not answer."""

    async def device(self, models: ModelSet) -> DeviceReport:
        """The device's report, its budget and its room for weights brought to those of ``models``, its agent started
        where there was none."""

    async def set_limits(self, engine_id: str, limits: Limits) -> None:
        """Raises SettingsError where they do not fit beside the other engines' now."""

    def free_bytes(self) -> int:
        """What the device can give to new engines. Raises SettingsError where it does not answer."""


class ModelKeeper:
    """The model set of one cluster, without any transport. One per file; belongs to one event loop."""

    def __init__(
        self,
        path: Path,
        initial: ModelSet,
        config: ClusterConfig,
        fleet: Fleet,
        now: Callable[[], float] = time.monotonic,
        device: Device = HOST,
    ) -> None:
        """Go on with the set in the file ``path``; with ``initial`` where there is no file.

        Args:
            config: how the memory is shared; its models are not read.
            device: of the engines.
        """
        self._device = device
        self._path, self._config, self._fleet, self._now = path, config, fleet, now
        self._report: DeviceReport | None = None
        self._stories: dict[str, ModelStory] = {}
        self._admissions: dict[str, tuple[ModelConfig, asyncio.Task[None]]] = {}
        self._sizing = asyncio.Lock()
        self.models = set_from_json(path.read_text(encoding="utf-8")) if path.exists() else initial
        self._store(self.models)

    @property
    def under_way(self) -> bool:
        """Something is being added or removed."""
        return bool(self._admissions) or any(entry.phase is not ModelPhase.SERVING for entry in self.models.entries)

    # Commands

    def add(self, config: ModelConfig) -> None:
        """Begin to add a model; ``story_of`` tells how it goes. The same again while it is being sized changes
        nothing. Raises ModelConflictError where it cannot be added whatever its size."""
        under_way = self._admissions.get(config.name)
        if under_way is not None and under_way[0] == config:
            return
        if under_way is not None:
            raise ModelConflictError(f"a model named {config.name!r} is being added; choose another with --name")
        self.models.check_new(config)
        self._stories[config.name] = ModelStory(self._now)
        task = asyncio.get_running_loop().create_task(self._admit(config))
        self._admissions[config.name] = (config, task)

    def remove(self, name: str) -> None:
        """Begin to remove a model: new requests are refused, those in flight end, then its replicas do. Again changes
        nothing. Raises UnknownModelError and ModelConflictError."""
        if (admission := self._admissions.pop(name, None)) is not None:
            admission[1].cancel()
            self._stories.pop(name)
            return
        story = self._stories.get(name)
        if name not in self.models.names and story is not None and story.error:
            del self._stories[name]  # it failed to start, and is only remembered
            return
        begun = self.models.get(name).stays
        self._store(self.models.withdraw(name))
        if begun:
            self._stories[name] = ModelStory(self._now)

    def limit(self, name: str, wanted: Mapping[str, int | None]) -> None:
        """Change what a model's replicas are guaranteed, and what they may hold at most, at once.

        wanted: new bytes by ``guarantee`` and ``ceiling``; None is what the engines started with, absent leaves it.
        Raises UnknownModelError, and SettingsError for limits that cannot hold.
        """
        entry = self.models.get(name)
        now, own = entry.limits_now, entry.own_limits
        guarantee, ceiling = wanted.get("guarantee", now.guarantee_bytes), wanted.get("ceiling", now.ceiling_bytes)
        self._store(self.models.limit(name, Limits(guarantee or own.guarantee_bytes, ceiling or own.ceiling_bytes)))

    # What there is

    def listing(self) -> list[dict[str, Any]]:
        """Every model, JSON-ready: what is meant, beside what its engines hold. Sizes are bytes; guarantee and ceiling
        are those of one replica."""
        rows = [_row(entry, self._engines_of(entry)) for entry in self.models.entries]
        others = [(name, "sizing") for name in self._admissions]
        others += [(name, "failed") for name, story in self._stories.items() if story.error]
        rows += [{"name": name, "phase": phase} for name, phase in others if name not in self.models.names]
        for row in rows:
            story = self._stories.get(row["name"])
            row["error"] = story.error if story else None
            row["progress"] = story.lines[-1][2] if story and story.lines else ""
        return rows

    def story_of(self, name: str) -> dict[str, Any]:
        """The model's row of ``listing`` and the lines of its story. Raises UnknownModelError."""
        row = next((row for row in self.listing() if row["name"] == name), None)
        if row is None:
            raise self.models.unknown(name)
        story = self._stories.get(name)
        return row | {"lines": list(story.lines) if story else []}

    # Steps

    async def tick(self) -> None:
        """Look at the cluster, and take the next step of every model. What is away is looked at again next time."""
        try:
            if self.models.budget_bytes:
                self._report = await self._fleet.device(self.models)
            apps = await self._fleet.apps()
            ingresses = await self._fleet.ingresses() if self.under_way else []
            for entry in self.models.entries:
                await self._step(entry, apps.get(entry.name), ingresses)
            await self._apply_limits()
        except (FleetAwayError, SettingsError) as error:
            logger.info("models: looking again later: %s", error)

    async def _step(self, entry: ModelEntry, app: AppState | None, ingresses: list[IngressState]) -> None:
        step = next_step(entry, app, ingresses)
        self._tell(entry, app, ingresses)
        if step.failure is not None:
            logger.error("model %s failed to start: %s", entry.name, step.failure)
            self._story(entry.name).fail(step.failure)
        if step.action is Action.DEPLOY:
            await self._fleet.deploy(entry, self.models)
        elif step.action is Action.DELETE:
            await self._fleet.delete(entry.name)
        if step.phase is entry.phase or entry not in self.models.entries:
            return  # nothing new, or a command has changed it meanwhile
        logger.info("model %s: %s -> %s", entry.name, entry.phase, step.phase or "gone")
        if step.phase is None:
            self._store(self.models.without(entry.name))
            if not self._story(entry.name).error:
                del self._stories[entry.name]
        else:
            self._store(self.models.moved(entry.name, step.phase))

    def _tell(self, entry: ModelEntry, app: AppState | None, ingresses: list[IngressState]) -> None:
        if entry.phase is ModelPhase.SERVING:
            return
        story = self._story(entry.name)
        if entry.phase is ModelPhase.DRAINING:
            left = sum(ingress.in_flight.get(entry.name, 0) for ingress in ingresses)
            story.say("drain", f"{left} requests in flight" if left else "no request is in flight")
        elif entry.phase is ModelPhase.LEAVING:
            story.say("replicas", "ending")
        elif app is not None:
            waits = [engine.start_bytes for engine in self._engines_of(entry) if engine.waits_to_start]
            story.say("replicas", "; ".join([app.progress, *(f"a start waits for {mib(one)}" for one in waits)]))
            if app.running:
                story.say("ready", "waiting for the API")

    async def _apply_limits(self) -> None:
        """Bring every engine to the limits that are set for its model. Those that do not fit yet, because others have
        to be lowered first, are applied next time."""
        for entry in [entry for entry in self.models.entries if entry.limits]:
            engines = self._engines_of(entry)
            other = [one.engine_id for one in engines if Limits(one.guarantee_bytes, one.ceiling_bytes) != entry.limits]
            for engine_id in other:
                try:
                    await self._fleet.set_limits(engine_id, entry.limits_now)
                except SettingsError as error:
                    logger.info("limits of %s have to wait: %s", engine_id, error)
            if not other and entry.limits == entry.own_limits and entry in self.models.entries:
                self._store(self.models.unlimited(entry.name))  # engines register with these by themselves

    async def _admit(self, config: ModelConfig) -> None:
        """Find, read and size a model, and put it into the set."""
        story = self._stories[config.name]
        try:
            story.say("model", f"looking for {config.source}")
            facts = await asyncio.to_thread(self._read, config, story)
            story.say("memory", "sizing")
            async with self._sizing:
                await self._size(config, facts, story)
        except (SettingsError, DefaultModelError) as error:
            story.fail(str(error))
        except FleetAwayError as error:
            story.fail(f"{error}; try again in a few seconds")
        finally:
            if self._stories.get(config.name) is story:
                self._admissions.pop(config.name, None)

    def _read(self, config: ModelConfig, story: ModelStory) -> ModelFacts:
        facts = read_facts(resolve_source(config.source, lambda line: story.say("model", line)), config)
        story.say("model", facts.weights_line)
        return facts

    async def _size(self, config: ModelConfig, facts: ModelFacts, story: ModelStory) -> None:
        models = self.models
        report = await self._fleet.device(models) if models.budget_bytes else None
        activations = sum(engine.activation_held_bytes for engine in report.engines) if report else 0
        room = Room(
            free_bytes=self._fleet.free_bytes(),
            pending_bytes=sum(entry.fixed_bytes(self._device) for entry in models.entries if entry.phase in _UNDER_WAY),
            held_bytes=report.held_bytes_os + activations if report else 0,
            guaranteed_bytes=models.promised_bytes,
            start_bytes=models.start_bytes,
            budget_bytes=models.budget_bytes,
        )
        addition = plan_addition(self._config, config, facts, room, self._device)
        spec = addition.spec
        story.say(
            "memory",
            f"{config.replicas_shown} x {spec.model_name}, {spec.max_model_len} tokens: KV in MiB "
            f"{spec.kv_rest_bytes // MIB} at rest, {addition.guarantee_bytes // MIB} guaranteed, "
            f"{spec.kv_ceiling_bytes // MIB} at most; KV budget {addition.budget_bytes / GIB:.2f} GiB",
        )
        self._store(self.models.admit(new_entry(config, spec, addition.guarantee_bytes), addition.budget_bytes))

    def _engines_of(self, entry: ModelEntry) -> list[EngineReport]:
        engines = self._report.engines if self._report and entry.spec.elastic else ()
        return [engine for engine in engines if engine.model == entry.name and engine.state in ("STARTING", "LIVE")]

    def _story(self, name: str) -> ModelStory:
        return self._stories.setdefault(name, ModelStory(self._now))

    def _store(self, models: ModelSet) -> None:
        """Replace the set, in the file first: what is answered has been kept."""
        draft = self._path.with_name(f"{self._path.name}.new")
        draft.touch(mode=0o600)
        draft.write_text(models.to_json(), encoding="utf-8")
        os.replace(draft, self._path)
        self.models = models


def _row(entry: ModelEntry, engines: list[EngineReport]) -> dict[str, Any]:
    limits = entry.limits_now
    return {
        "name": entry.name,
        "phase": str(entry.phase),
        "source": entry.config.source,
        "elastic": entry.spec.elastic,
        "replicas": entry.config.replicas,
        "min_replicas": entry.config.least_replicas,
        "max_replicas": entry.config.most_replicas,
        "max_model_len": entry.spec.max_model_len,
        "weight": entry.spec.weight,
        "weights_bytes": entry.spec.weights_bytes,
        "guarantee_bytes": limits.guarantee_bytes if entry.spec.elastic else entry.spec.kv_ceiling_bytes,
        "ceiling_bytes": limits.ceiling_bytes if entry.spec.elastic else entry.spec.kv_ceiling_bytes,
        "limit_bytes": sum(engine.limit_bytes for engine in engines),
        "held_bytes": sum(engine.held_bytes_os for engine in engines),
        "running": sum(engine.running for engine in engines),
        "waiting": sum(engine.waiting for engine in engines),
    }
