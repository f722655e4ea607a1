"""The Ray Serve applications: one with the ingress that serves the API, one for each model with its engine replicas.

    ellm             ApiIngress                vLLM's OpenAI server, a ClusterEngine for each model
    ellm-model:<m>   EngineReplica x replicas  behind our request router

Models come and go by their applications; the ingress follows the registry (``cluster.model_registry``). vLLM is
imported in the replicas, not here: the process that deploys an application does without.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import LoggingConfig
from starlette.applications import Starlette

from cluster.router import PressureRouter
from replicas.environment import engine_environment
from replicas.replica import EngineReplica
from replicas.spec import EngineSpec

if TYPE_CHECKING:
    from cluster.config import ModelConfig
    from cluster.model_plan import IngressState
    from cluster.model_table import ModelTable
    from memory_agent.agent import AgentSpec

APP_NAME = "ellm"
API_DEPLOYMENT = "api"
MODEL_APPS = "ellm-model:"
ENGINE_DEPLOYMENT = "engine"
REPLICA_REQUEST_LIMIT = 1024
"""Requests one replica takes at once, running and waiting; more are refused with 503 while a response can still
carry it."""
INGRESS_REQUEST_LIMIT = 8192
REPLICA_CPUS = 0.01
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


def model_app_name(model: str) -> str:
    """The application of a model; ``urllib.parse.unquote`` gives the model's name back."""
    return MODEL_APPS + quote(model, safe="")


def build_api_app(ingress_replicas: int) -> serve.Application:
    """The API over all models of the registry."""
    ingress = serve.deployment(
        name=API_DEPLOYMENT,
        num_replicas=ingress_replicas,
        max_ongoing_requests=INGRESS_REQUEST_LIMIT,
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=SHUTDOWN_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=_QUIET,
        ray_actor_options={"num_cpus": REPLICA_CPUS},
    )(serve.ingress()(ApiIngress))
    return ingress.bind()


def build_model_app(
    spec: EngineSpec, config: "ModelConfig", engines: int, agent_spec: "AgentSpec | None"
) -> serve.Application:
    """The engine replicas of one model.

    Args:
        engines: replicas of all models on this host: they share its cores.
        agent_spec: the memory agent that an elastic engine registers with; None where it is not elastic.
    """
    deployment = _engine_deployment(config.replicas, engine_environment(spec, engines))
    return deployment.bind(spec, agent_spec)  # type: ignore[no-any-return]


def _engine_deployment(replicas: int, environment: dict[str, str]) -> Any:
    routing = RequestRouterConfig(request_router_class=PressureRouter)  # type: ignore[arg-type]  # typed as for JSON
    return serve.deployment(
        name=ENGINE_DEPLOYMENT,
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
    """Serves the API. Ray Serve builds one for each ingress replica; it is ready when it has every model that the
    cluster serves already."""

    def __init__(self) -> None:
        self._table: ModelTable | None = None

    async def __serve_build_asgi_app__(self) -> Starlette:
        """Called by Ray Serve once, on the event loop that will serve requests."""
        from cluster.ingress import build_ingress

        self._table, api = await build_ingress(REPLICA_REQUEST_LIMIT)
        return api

    async def model_state(self) -> "IngressState":
        """Asked by the registry: the models of this process."""
        if self._table is None:
            raise RuntimeError("the API is still being built")
        return self._table.state()
