"""Calls of memory agents by their names, on whatever node they are."""

import asyncio
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from memory_agent.controller_link import NAMESPACE


class AgentCalls:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._handles: dict[str, ActorHandle[Any]] = {}

    async def __call__(self, agent: str, method: str, *args: object) -> Any:
        """The answer. A call is made once, also where its agent dies; cancelled, it is cancelled there too. Raises
        RayError, and ValueError where there is no such agent."""
        if agent not in self._handles:
            # Blocks on the cluster's control store, which may itself be away.
            self._handles[agent] = await asyncio.to_thread(ray.get_actor, agent, NAMESPACE)
        answer = getattr(self._handles[agent], method).options(max_task_retries=0).remote(*args)
        try:
            return await answer
        except asyncio.CancelledError:
            ray.cancel(answer)
            raise
        except RayTaskError:
            raise
        except RayError:
            self._handles.pop(agent, None)
            raise
