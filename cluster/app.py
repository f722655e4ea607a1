"""The Ray Serve applications: one with the ingress that serves the API, one for each model with its engine replicas.

    ellm             ApiIngress                vLLM's OpenAI server, a ClusterEngine for each model
    ellm-model:<m>   EngineReplica x replicas  behind our request router

Models come and go by their applications; the ingress follows the registry (``cluster.model_registry``). vLLM is
imported in the replicas, not here: the process that deploys an application does without.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from cluster.dispatcher import RoutingSettings
from cluster.router import PressureRouter
from replicas.environment import engine_environment
from replicas.replica import EngineReplica
from replicas.spec import EngineSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray.serve.handle import DeploymentHandle

    from cluster.api_key import ApiKey
    from cluster.config import ClusterConfig, ModelConfig
    from cluster.metrics_text import TextFamilies
    from cluster.migration_api import MoveAnswer
    from cluster.model_plan import IngressState
    from cluster.model_set import ModelEntry
    from cluster.slo_ledger import SloReport
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
ANSWER_TIMEOUT_S = 600.0
"""A replica that ends, because fewer are enough, lets its requests go on for so long."""
SHUTDOWN_TIMEOUT_S = 20.0
DRAIN_S = 15
"""Of these, for requests that an ingress has when it is stopped."""
_QUIET = LoggingConfig(enable_access_log=False)


@dataclass(frozen=True)
class ApiModel:
    """What the ingress needs to know of one model.

    Attributes:
        replicas: the most that can run; may_rest: there can be none, until a request comes.
    """

    spec: EngineSpec
    replicas: int
    tool_call_parser: str | None
    reasoning_parser: str | None
    may_rest: bool = False


def api_model(entry: "ModelEntry") -> ApiModel:
    """Of a model of the registry."""
    config = entry.config
    return ApiModel(
        entry.spec,
        config.most_replicas,
        config.tool_call_parser,
        config.reasoning_parser,
        may_rest=config.least_replicas == 0,
    )


def model_app_name(model: str) -> str:
    """The application of a model; ``urllib.parse.unquote`` gives the model's name back."""
    return MODEL_APPS + quote(model, safe="")


def build_api_app(
    config: "ClusterConfig", control: serve.Application | None = None, own_keys: "Sequence[ApiKey]" = ()
) -> serve.Application:
    """The API over all models of the registry; of ``config`` it takes what is not a model's.

    Args:
        control: the deployment that starts the registry, where it is one of this application (``cluster.serve_app``).
        own_keys: beside those of the keys file.
    """
    ingress = serve.deployment(
        name=API_DEPLOYMENT,
        num_replicas=config.http.ingress_replicas,
        health_check_period_s=2.0,
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=SHUTDOWN_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=_QUIET,
        ray_actor_options={"num_cpus": REPLICA_CPUS},
    )(ApiIngress)
    return ingress.bind(config, control, own_keys)


def routing_settings(config: "ClusterConfig") -> RoutingSettings:
    """For the routers in all ingress processes; requests without targets have those of the first class."""
    first = config.slo[0]
    return RoutingSettings(config.routing.policy, config.http.ingress_replicas, first.ttft_ms, first.tpot_ms)


def build_model_app(
    spec: EngineSpec,
    config: "ModelConfig",
    engines: int,
    agent_spec: "AgentSpec | None",
    routing: RoutingSettings,
) -> serve.Application:
    """The engine replicas of one model.

    Args:
        engines: replicas of all models on this host: they share its cores.
        agent_spec: the memory agent that an elastic engine registers with; None where it is not elastic.
    """
    number = (
        {"autoscaling_config": _scaling(spec, config, routing)} if config.scales else {"num_replicas": config.replicas}
    )
    deployment = _engine_deployment(number, engine_environment(spec, engines), routing)
    return deployment.bind(spec, agent_spec)  # type: ignore[no-any-return]


def _scaling(spec: EngineSpec, config: "ModelConfig", routing: RoutingSettings) -> AutoscalingConfig:
    """Ray Serve counts, looks and acts; ``cluster.autoscaling`` decides, so Serve's own delays are off."""
    settings = {
        "model": spec.model_name,
        "tpot_target_s": routing.tpot_ms / 1000,
        "calm_s": config.autoscaling_config.downscale_delay_s,
        "requests": spec.max_num_seqs,
    }
    policy = AutoscalingPolicy(  # type: ignore[no-untyped-call]
        policy_function="cluster.autoscaling:DemandPolicy", policy_kwargs=settings
    )
    return AutoscalingConfig(
        min_replicas=config.least_replicas,
        max_replicas=config.most_replicas,
        initial_replicas=config.replicas,
        metrics_interval_s=1.0,
        look_back_period_s=3.0,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        policy=policy,
    )


def _engine_deployment(number: dict[str, Any], environment: dict[str, str], routing: RoutingSettings) -> Any:
    router: Any = PressureRouter  # Ray Serve's configuration is typed as for JSON
    return serve.deployment(
        name=ENGINE_DEPLOYMENT,
        **number,
        max_ongoing_requests=REPLICA_REQUEST_LIMIT,
        max_constructor_retry_count=1,
        health_check_period_s=2.0,
        health_check_timeout_s=20.0,
        graceful_shutdown_timeout_s=ANSWER_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=_QUIET,
        ray_actor_options={"num_cpus": REPLICA_CPUS, "runtime_env": {"env_vars": environment}},
        request_router_config=RequestRouterConfig(request_router_class=router, request_router_kwargs=asdict(routing)),
    )(EngineReplica)


class ApiIngress:
    """Serves the API on an address of its node, which all its replicas there share. Built when it takes requests, with
    every model that the cluster serves already."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self,
        config: "ClusterConfig",
        control: "DeploymentHandle[Any] | None" = None,
        own_keys: "Sequence[ApiKey]" = (),
    ) -> None:
        """Must run on the event loop that will serve requests, as Ray Serve does it. Raises OSError where nothing can
        listen at its address."""
        from cluster.http_server import Certificate, HttpServer
        from cluster.ingress import build_ingress

        if control is not None:
            await control.started.remote()
        rank = serve.get_replica_context().rank.rank
        self._ingress = await build_ingress(config, REPLICA_REQUEST_LIMIT, rank, own_keys)
        http, api = config.http, self._ingress.api
        certificate = Certificate(http.ssl_certfile, http.ssl_keyfile) if http.ssl_certfile is not None else None
        self._server = HttpServer(api, http.host, http.port, INGRESS_REQUEST_LIMIT, DRAIN_S, http.limits, certificate)
        await self._server.start()

    async def model_state(self) -> "IngressState":
        """Asked by the registry: the models of this process."""
        return self._ingress.table.state()

    async def slo_report(self) -> "SloReport":
        """Asked by every ingress process that shows the cluster's state."""
        return self._ingress.ledger.report()

    async def metrics(self) -> "TextFamilies":
        """Asked by the ingress process that Prometheus asks."""
        return await self._ingress.metrics.read()

    async def migrate(self, request_id: str, to: str) -> "MoveAnswer | None":
        """Asked by the ingress process that was told to move a request that it has not."""
        from cluster.migration_api import move_here

        cores = [model.engine.engine_core for model in self._ingress.table.routed]
        return await move_here(cores, request_id, to)

    async def check_health(self) -> None:
        """Called by Ray Serve: raises where the server has ended, which replaces this process."""
        if not self._server.serves:
            raise RuntimeError("the HTTP server has ended")

    async def __del__(self) -> None:
        """Ray Serve's destructor: let the requests that run end."""
        if (server := getattr(self, "_server", None)) is not None:
            await server.stop()
