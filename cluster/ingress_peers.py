"""All ingress processes, asked by one of them."""

import asyncio
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.app import API_DEPLOYMENT, APP_NAME

_ANSWER_TIMEOUT_S = 2.0


class IngressPeers:
    """Belongs to the event loop of its ingress. ``count``: of processes, this one included."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._handle: DeploymentHandle[Any] | None = None

    async def ask(self, method: str, *args: Any, timeout_s: float = _ANSWER_TIMEOUT_S) -> list[Any]:
        """What each process answers, this one included; empty where they do not answer in time, or are no others."""
        if self.count == 1:
            return []
        try:
            if self._handle is None:
                self._handle = await asyncio.to_thread(serve.get_deployment_handle, API_DEPLOYMENT, APP_NAME)
            answers = await self._handle.broadcast(method, *args).results_async(
                timeout_s=timeout_s, return_exceptions=True
            )
        except (RayError, RayServeException, TimeoutError):
            return []
        return [answer for answer in answers if not isinstance(answer, BaseException)]
