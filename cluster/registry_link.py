"""An ingress's tie to the model registry: its view, followed by a long poll."""

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from memory_agent.controller_link import NAMESPACE

if TYPE_CHECKING:
    from cluster.model_registry import ModelsView
    from cluster.model_table import ModelTable

logger = logging.getLogger("ray.serve")

MODELS_NAME = "ellm-models"
WATCH_TIMEOUT_S = 10.0
RETRY_PERIOD_S = 0.5


class RegistryFollower:
    """Brings ``table`` to every view of the registry. While the registry is away the table stays as it is."""

    def __init__(self, table: "ModelTable") -> None:
        self._table = table
        self._registry: Any = None
        self._revision = 0

    async def first(self) -> Sequence[str]:
        """Wait for the registry's view, and return the names of the models that are served already."""
        while (view := await self._step()) is None:
            continue
        return sorted(view.serving)

    async def run(self) -> None:
        """Follow for ever."""
        while True:
            await self._step()

    async def _step(self) -> "ModelsView | None":
        try:
            self._registry = self._registry or await asyncio.to_thread(registry_actor)
            view: ModelsView = await self._registry.watch.remote(self._revision, WATCH_TIMEOUT_S)
        except (RayError, ValueError) as error:  # it is being restarted
            self._registry, self._revision = None, 0
            logger.debug("no view of the models: %s", error)
            await asyncio.sleep(RETRY_PERIOD_S)
            return None
        self._revision = view.revision
        self._table.follow(view.models)
        return view


def registry_actor() -> Any:
    """The registry's handle. Raises ValueError where it does not run."""
    return ray.get_actor(MODELS_NAME, namespace=NAMESPACE)
