"""The controller's snapshot and decisions, for a process that only shows them."""

import asyncio
from typing import Any

import ray
from ray.exceptions import RayError

from memory_agent.controller_link import CONTROLLER_NAME, NAMESPACE

ANSWER_TIMEOUT_S = 5.0


class ControllerAwayError(RuntimeError):
    """The controller gave no answer. Requests are served without it; try again when it is back."""


async def read_snapshot() -> dict[str, Any]:
    """The controller's JSON-ready snapshot. Raises ControllerAwayError."""
    snapshot: dict[str, Any] = await _ask("snapshot")
    return snapshot


async def read_decisions(count: int, subject: str) -> list[dict[str, Any]]:
    """Its last decisions, JSON-ready, the newest first; see DecisionLog.last. Raises ControllerAwayError."""
    decisions: list[dict[str, Any]] = await _ask("decisions", count, subject)
    return decisions


async def _ask(method: str, *args: Any) -> Any:
    try:
        controller = await asyncio.to_thread(ray.get_actor, CONTROLLER_NAME, namespace=NAMESPACE)
        return await asyncio.wait_for(getattr(controller, method).remote(*args), ANSWER_TIMEOUT_S)
    except ValueError as error:
        raise ControllerAwayError("the cluster's controller is not running") from error
    except TimeoutError as error:
        raise ControllerAwayError(f"the cluster's controller did not answer within {ANSWER_TIMEOUT_S:g} s") from error
    except RayError as error:
        raise ControllerAwayError(f"the cluster's controller is away: {type(error).__name__}") from error
