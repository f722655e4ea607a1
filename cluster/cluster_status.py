"""The controller's snapshot, decisions and measures, for a process that only shows them."""

import asyncio
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from memory_agent.controller_link import CONTROLLER_NAME, NAMESPACE

if TYPE_CHECKING:
    from cluster.cluster_view import ControllerMeasures

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


async def read_measures(timeout_s: float) -> "ControllerMeasures":
    """What metrics tell of it. Raises ControllerAwayError."""
    measures: ControllerMeasures = await _ask("measures", timeout_s=timeout_s)
    return measures


async def _ask(method: str, *args: Any, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
    try:
        controller = await asyncio.to_thread(ray.get_actor, CONTROLLER_NAME, namespace=NAMESPACE)
        return await asyncio.wait_for(getattr(controller, method).remote(*args), timeout_s)
    except ValueError as error:
        raise ControllerAwayError("the cluster's controller is not running") from error
    except TimeoutError as error:
        raise ControllerAwayError(f"the cluster's controller did not answer within {timeout_s:g} s") from error
    except RayError as error:
        raise ControllerAwayError(f"the cluster's controller is away: {type(error).__name__}") from error
