"""The model registry: a Ray actor that owns which models the cluster serves.

A thin shell around ModelKeeper. Its hard state is a file in shared memory, beside the lease board, so its death costs
nothing but time: Ray starts it again, it goes on from the file, and meanwhile every model serves on. Ingresses follow
it by a long poll; commands come through the API (``cluster.models_api``).
"""

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from cluster.app import ApiModel, api_model, routing_settings
from cluster.config import ClusterConfig, ModelConfig
from cluster.device import device_named
from cluster.model_keeper import ModelKeeper
from cluster.model_set import ModelPhase, ModelSet
from cluster.registry_link import MODELS_NAME
from cluster.serve_fleet import ServeFleet
from memory_agent.durable_actor import ensure_actor

_TICK_S = 1.0
_BUSY_TICK_S = 0.25
_WATCH_MAX_S = 30.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelsView:
    """The models that an ingress should have.

    Attributes:
        revision: differs from that of every other view, also across restarts of the registry.
        models: to be built and served, in order; serving: names of those that are complete everywhere.
    """

    revision: int
    models: tuple[ApiModel, ...]
    serving: frozenset[str]


@dataclass(frozen=True)
class RegistrySpec:
    """What the registry is made from. cluster_id and device name its file and the device's memory agent."""

    cluster_id: str
    device: str
    config: ClusterConfig

    @property
    def path(self) -> Path:
        return Path(f"/dev/shm/ellm-{self.cluster_id}-models.json")


def ensure_registry(spec: RegistrySpec, initial: ModelSet) -> ActorHandle[Any]:
    """The registry, started on this node where there is none, with the models of ``initial``. Does not wait for the
    start. It deploys nothing before the API's application is there."""
    node_id = ray.get_runtime_context().get_node_id()
    return ensure_actor(ModelRegistry, MODELS_NAME, node_id, spec, initial, soft=False)


class ModelRegistry:
    """Actor methods. Calls are run again when the actor died under them: all are idempotent."""

    async def __init__(self, spec: RegistrySpec, initial: ModelSet) -> None:  # type: ignore[misc]  # Ray awaits it
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
        routing, fetch_rate = routing_settings(spec.config), spec.config.memory.fetch_rate
        fleet = ServeFleet(spec.cluster_id, spec.device, routing, fetch_rate)
        device = device_named(spec.device)
        self._config = spec.config
        self._keeper = ModelKeeper(spec.path, initial, spec.config, fleet, device=device)
        self._revision = time.time_ns()
        self._shown: tuple[tuple[ApiModel, ...], frozenset[str]] | None = None
        self._changed = asyncio.Condition()
        self._hurry = asyncio.Event()
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(_die_with)

    async def configuration(self) -> ClusterConfig:
        """What the cluster was started with."""
        return self._config

    async def add(self, config: ModelConfig) -> None:
        """Begin to add a model. Raises ModelConflictError."""
        self._keeper.add(config)
        self._hurry.set()

    async def remove(self, name: str) -> None:
        """Begin to remove a model. Raises UnknownModelError and ModelConflictError."""
        self._keeper.remove(name)
        await self._publish()
        self._hurry.set()

    async def limit(self, name: str, wanted: Mapping[str, int | None]) -> None:
        """Change a model's limits, see ModelKeeper.limit. Raises UnknownModelError and SettingsError."""
        self._keeper.limit(name, wanted)
        self._hurry.set()

    async def listing(self) -> list[dict[str, Any]]:
        """Every model, JSON-ready."""
        return self._keeper.listing()

    async def story_of(self, name: str) -> dict[str, Any]:
        """One model and how its addition or removal goes, JSON-ready. Raises UnknownModelError."""
        return self._keeper.story_of(name)

    async def watch(self, seen_revision: int, timeout_s: float) -> ModelsView:
        """The view as soon as its revision is not ``seen_revision``, at the latest after ``timeout_s``, of which at
        most 30 s count. Pass 0 first, then the revision of the last answer."""
        deadline_s = time.monotonic() + min(timeout_s, _WATCH_MAX_S)
        await self._publish()
        async with self._changed:
            while self._revision == seen_revision and (left_s := deadline_s - time.monotonic()) > 0:
                try:
                    await asyncio.wait_for(self._changed.wait(), left_s)
                except TimeoutError:
                    break
        return self._view()

    async def _run(self) -> None:
        while True:
            self._hurry.clear()
            await self._keeper.tick()
            await self._publish()
            try:
                await asyncio.wait_for(self._hurry.wait(), _BUSY_TICK_S if self._keeper.under_way else _TICK_S)
            except TimeoutError:
                continue

    async def _publish(self) -> None:
        entries = [entry for entry in self._keeper.models.entries if entry.stays]
        models = tuple(api_model(one) for one in entries if one.phase is not ModelPhase.ADMITTED)
        shown = (models, frozenset(one.name for one in entries if one.phase is ModelPhase.SERVING))
        if shown != self._shown:
            self._shown = shown
            self._revision += 1
            async with self._changed:
                self._changed.notify_all()

    def _view(self) -> ModelsView:
        models, serving = self._shown or ((), frozenset())
        return ModelsView(self._revision, models, serving)


def _die_with(task: "asyncio.Task[None]") -> None:
    """End this process when its task failed: Ray starts the registry again, and it goes on from its file."""
    if not task.cancelled():
        logger.error("the model registry stops, its own task failed", exc_info=task.exception())
        logging.shutdown()
        os._exit(1)
