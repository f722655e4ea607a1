"""The running cluster for ``ModelKeeper``: Ray Serve's applications, the ingress processes, and the memory agent."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import unquote

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatusOverview

from cluster.app import API_DEPLOYMENT, APP_NAME, MODEL_APPS, build_model_app, model_app_name
from cluster.device import device_named
from cluster.dispatcher import RoutingSettings
from cluster.launch_error import root_cause
from cluster.model_keeper import FleetAwayError
from cluster.model_plan import AppState, IngressState
from cluster.model_set import Limits, ModelEntry, ModelSet
from memory_agent.agent import AgentSpec, ensure_agent
from memory_agent.errors import SettingsError
from memory_agent.reports import DeviceReport

_ANSWER_TIMEOUT_S = 5.0

T = TypeVar("T")

logger = logging.getLogger(__name__)


class ServeFleet:
    """Implements ``cluster.model_keeper.Fleet``. Without the API's application it counts as away: before the cluster is
    started, and when it is being stopped."""

    def __init__(
        self, cluster_id: str, device: str, routing: RoutingSettings, fetch_bytes_s: int | None = None
    ) -> None:
        """fetch_bytes_s: see ``AgentSpec``, of every node's."""
        self._cluster_id, self._device, self._routing = cluster_id, device, routing
        self._fetch_bytes_s = fetch_bytes_s
        self._agent: Any = None
        self._api: DeploymentHandle[Any] | None = None
        self._deletions: dict[str, asyncio.Task[None]] = {}

    async def apps(self) -> Mapping[str, AppState]:
        status = await _in_thread(serve.status)
        if APP_NAME not in status.applications or status.applications[APP_NAME].status == "DELETING":
            raise FleetAwayError("the API does not run")
        return {
            unquote(name.removeprefix(MODEL_APPS)): app_state(app)
            for name, app in status.applications.items()
            if name.startswith(MODEL_APPS)
        }

    async def deploy(self, entry: ModelEntry, models: ModelSet) -> None:
        # Where no model is elastic there is no budget, and no agent's specification either.
        agent_spec = self._agent_spec(models) if entry.spec.elastic else None
        app = build_model_app(entry.spec, entry.config, models.replicas, agent_spec, self._routing)
        target = serve.RunTarget(app, name=model_app_name(entry.name), route_prefix=None)
        await _in_thread(lambda: serve.run_many([target], wait_for_applications_running=False))

    async def delete(self, name: str) -> None:
        under_way = self._deletions.get(name)
        if under_way is None or under_way.done():
            self._deletions[name] = asyncio.create_task(self._delete(name))

    async def ingresses(self) -> list[IngressState]:
        if self._api is None:
            self._api = await _in_thread(lambda: serve.get_deployment_handle(API_DEPLOYMENT, APP_NAME))
        try:
            answers = await self._api.broadcast("model_state").results_async(
                timeout_s=_ANSWER_TIMEOUT_S, return_exceptions=True
            )
        except (RayError, RayServeException, TimeoutError):
            return []
        states = [answer for answer in answers if isinstance(answer, IngressState)]
        return states if len(states) == len(answers) else []

    async def device(self, models: ModelSet) -> DeviceReport:
        wanted = self._agent_spec(models)
        if self._agent is None:
            self._agent = await _in_thread(lambda: ensure_agent(wanted))
        report: DeviceReport = await self._ask(self._agent.report.remote())
        if (report.budget_bytes, report.weights_bytes) != (wanted.budget_bytes, wanted.weights_bytes):
            await self._ask(self._agent.set_budget.remote(wanted.budget_bytes, wanted.weights_bytes))
        return report

    async def set_limits(self, engine_id: str, limits: Limits) -> None:
        await self._ask(self._agent.set_limits.remote(engine_id, limits.guarantee_bytes, limits.ceiling_bytes))

    def free_bytes(self) -> int:
        return device_named(self._device).free_bytes()

    async def _delete(self, name: str) -> None:
        try:
            await _in_thread(lambda: serve.delete(model_app_name(name)))
        except (FleetAwayError, TimeoutError) as error:  # it goes on, or is asked for again
            logger.info("deleting %s: %s", name, error)

    def _agent_spec(self, models: ModelSet) -> AgentSpec:
        sizes = models.budget_bytes, models.weights_bytes
        return AgentSpec(self._cluster_id, self._device, *sizes, fetch_bytes_s=self._fetch_bytes_s)

    async def _ask(self, answer: Awaitable[T]) -> T:
        try:
            return await asyncio.wait_for(answer, _ANSWER_TIMEOUT_S)
        except RayTaskError as error:
            if isinstance(error.cause, SettingsError):
                raise error.cause from error
            raise FleetAwayError(f"the memory agent failed: {error.cause}") from error
        except (RayError, TimeoutError) as error:
            raise FleetAwayError(f"the memory agent is away ({type(error).__name__})") from error


def app_state(app: ApplicationStatusOverview) -> AppState:
    """What of Serve's status decides about a model."""
    parts = []
    for deployment in app.deployments.values():
        running = sum(count for state, count in deployment.replica_states.items() if state == "RUNNING")
        parts.append(f"{running} of {sum(deployment.replica_states.values())} replicas are up")
    failed = None
    if app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
        messages = [app.message, *(d.message for d in app.deployments.values() if d.status != "HEALTHY")]
        failed = root_cause("\n".join(messages))
    return AppState(
        running=app.status == "RUNNING",
        deleting=app.status == "DELETING",
        progress=", ".join(parts) or "starting",
        failed=failed,
    )


async def _in_thread(call: Callable[[], T]) -> T:
    """Serve's calls block on its controller."""
    try:
        return await asyncio.to_thread(call)
    except (RayError, RayServeException) as error:
        raise FleetAwayError(f"Ray Serve is away ({type(error).__name__})") from error
