"""The Ray Serve application: one deployment of engine replicas for each model, and the ingress that serves the API
over them.

    build_app(config, specs, agent_spec) -> Application
        ApiIngress                       vLLM's OpenAI server, a ClusterEngine for each model
        engine:<model> x replicas        EngineReplica, behind our request router

vLLM is imported in the replicas, not here: the process that deploys the application does without.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.applications import Starlette

from cluster.router import PressureRouter
from replicas.environment import engine_environment
from replicas.replica import EngineReplica
from replicas.spec import EngineSpec

if TYPE_CHECKING:
    from cluster.config import ClusterConfig
    from memory_agent.agent import AgentSpec

REPLICA_REQUEST_LIMIT = 1024
"""Requests one replica takes at once, running and waiting; more are refused with 503 while a response can still
carry it."""
INGRESS_REQUEST_LIMIT = 8192
REPLICA_CPUS = 0.1
"""A share for Ray's bookkeeping only: what an engine's threads use is in its environment."""
SHUTDOWN_TIMEOUT_S = 20.0
_QUIET = LoggingConfig(enable_access_log=False)


@dataclass(frozen=True)
class ApiModel:
    """What the ingress needs to know of one model."""

    spec: EngineSpec
    replicas: int
    tool_call_parser: str | None
    reasoning_parser: str | None


def build_app(
    config: "ClusterConfig", specs: Sequence[EngineSpec], agent_spec: "AgentSpec | None"
) -> serve.Application:
    """The application for ``serve.run``.

    Args:
        specs: one for each of config.models, in their order.
        agent_spec: the memory agent that elastic engines register with; None where no engine is elastic.
    """
    models, engines = [], []
    replicas = sum(model.replicas for model in config.models)
    for model, spec in zip(config.models, specs, strict=True):
        models.append(ApiModel(spec, model.replicas, model.tool_call_parser, model.reasoning_parser))
        deployment = _engine_deployment(spec, model.replicas, engine_environment(spec, replicas))
        engines.append(deployment.bind(spec, agent_spec if spec.elastic else None))
    ingress = serve.deployment(
        name="api",
        num_replicas=config.http.ingress_replicas,
        max_ongoing_requests=INGRESS_REQUEST_LIMIT,
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=SHUTDOWN_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=_QUIET,
        ray_actor_options={"num_cpus": REPLICA_CPUS},
    )(serve.ingress()(ApiIngress))
    return ingress.bind(models, engines)


def _engine_deployment(spec: EngineSpec, replicas: int, environment: dict[str, str]) -> Any:
    routing = RequestRouterConfig(request_router_class=PressureRouter)  # type: ignore[arg-type]  # typed as for JSON
    return serve.deployment(
        name=f"engine:{spec.model_name.replace('/', '--')}",
        num_replicas=replicas,
        max_ongoing_requests=REPLICA_REQUEST_LIMIT,
        max_constructor_retry_count=1,
        health_check_period_s=2.0,
        health_check_timeout_s=20.0,
        graceful_shutdown_timeout_s=SHUTDOWN_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=_QUIET,
        ray_actor_options={"num_cpus": REPLICA_CPUS, "runtime_env": {"env_vars": environment}},
        request_router_config=routing,
    )(EngineReplica)


class ApiIngress:
    """Serves the API. Ray Serve builds one for each ingress replica; it is ready when a replica of each model is."""

    def __init__(self, models: list[ApiModel], engines: list[DeploymentHandle[Any]]) -> None:
        self._models = models
        self._engines = engines

    async def __serve_build_asgi_app__(self) -> Starlette:
        """Called by Ray Serve once, on the event loop that will serve requests."""
        from cluster.ingress import build_ingress

        return await build_ingress(self._models, self._engines, REPLICA_REQUEST_LIMIT)
