"""The controller's snapshot, for a process that only shows it."""

import asyncio
from typing import Any

import ray
from ray.exceptions import RayError

from memory_agent.controller_link import CONTROLLER_NAME, NAMESPACE

SNAPSHOT_TIMEOUT_S = 5.0


class ControllerAwayError(RuntimeError):
    """The controller gave no snapshot. Requests are served without it; try again when it is back."""


async def read_snapshot() -> dict[str, Any]:
    """The controller's JSON-ready snapshot. Raises ControllerAwayError."""
    try:
        controller = await asyncio.to_thread(ray.get_actor, CONTROLLER_NAME, namespace=NAMESPACE)
        snapshot: dict[str, Any] = await asyncio.wait_for(controller.snapshot.remote(), SNAPSHOT_TIMEOUT_S)
    except ValueError as error:
        raise ControllerAwayError("the cluster's controller is not running") from error
    except TimeoutError as error:
        raise ControllerAwayError(f"the cluster's controller did not answer within {SNAPSHOT_TIMEOUT_S:g} s") from error
    except RayError as error:
        raise ControllerAwayError(f"the cluster's controller is away: {type(error).__name__}") from error
    return snapshot
