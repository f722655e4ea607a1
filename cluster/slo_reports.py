"""How requests have fared in all ingress processes, asked of each."""

import asyncio
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.app import API_DEPLOYMENT, APP_NAME
from cluster.slo_ledger import SloLedger, SloReport

_ANSWER_TIMEOUT_S = 2.0


class SloReports:
    """Belongs to the event loop of its ingress, whose own report is always there."""

    def __init__(self, own: SloLedger, ingresses: int) -> None:
        self._own, self._ingresses = own, ingresses
        self._handle: DeploymentHandle[Any] | None = None

    async def read(self) -> list[SloReport]:
        """Of all ingress processes; of this one alone where another does not answer soon."""
        if self._ingresses == 1:
            return [self._own.report()]
        try:
            if self._handle is None:
                self._handle = await asyncio.to_thread(serve.get_deployment_handle, API_DEPLOYMENT, APP_NAME)
            answers = await self._handle.broadcast("slo_report").results_async(
                timeout_s=_ANSWER_TIMEOUT_S, return_exceptions=True
            )
        except (RayError, RayServeException, TimeoutError):
            return [self._own.report()]
        return [answer for answer in answers if isinstance(answer, SloReport)]
