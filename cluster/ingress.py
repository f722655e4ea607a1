"""What one ingress process holds: for each model a ClusterEngine over its replicas, and the API over all of them."""

import asyncio
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.util import get_node_ip_address
from starlette.applications import Starlette
from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app as build_vllm_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser

from cluster.api import build_api
from cluster.api_key import ApiKey
from cluster.api_metrics import IngressMetrics, MetricsEndpoint, stat_logger_in
from cluster.app import ENGINE_DEPLOYMENT, ApiModel, model_app_name
from cluster.auth_layer import AuthLayer
from cluster.body_limits import BodyLimits
from cluster.cluster_view import PressureView
from cluster.config import ClusterConfig, HttpLimits
from cluster.core_client import ClusterCore
from cluster.door import open_door
from cluster.engine import ClusterEngine, check_upstream
from cluster.ingress_peers import IngressPeers
from cluster.key_ring import KeyRing
from cluster.malformed import answer_malformed
from cluster.model_table import ModelTable, ServedModel
from cluster.plain_paths import PlainPaths
from cluster.pressure_view import PressureFollower
from cluster.registry_link import RegistryFollower
from cluster.slo_layer import SloLayer
from cluster.slo_ledger import SloLedger
from cluster.slo_reports import SloReports
from replicas.engine_config import build_engine_args
from replicas.replica import ReplicaInfo

_SUCCESSOR_S, _AGAIN_S = 60.0, 0.2


@dataclass(frozen=True)
class Ingress:
    """What one process holds: the models of the registry, kept up to date while the application runs, how their
    requests fare, its metrics, and the application."""

    table: ModelTable
    ledger: SloLedger
    metrics: IngressMetrics
    api: Starlette


async def build_ingress(
    settings: ClusterConfig, replica_limit: int, rank: int, own_keys: Sequence[ApiKey] = ()
) -> Ingress:
    """Waits for the models that are served already.

    Args:
        settings: its classes and its admission count here.
        replica_limit: requests that one replica takes at once.
        rank: of this process among the ingress processes.
        own_keys: API keys beside those of the keys file, where there is one.

    Raises UpstreamChangedError for another vLLM than the supported one, KeyFileError for a keys file that cannot be
    used.
    """
    check_upstream()
    keys = _keys(settings, own_keys)
    table, ledger = ModelTable(lambda model: _serve(model, settings, replica_limit)), SloLedger()
    follower = RegistryFollower(table)
    await table.until_ready(await follower.first())
    peers, metrics = IngressPeers(settings.http.ingress_replicas), IngressMetrics(table, ledger, rank)
    layer, reports = SloLayer(settings.slo, ledger), SloReports(ledger, peers)

    def relieve(view: PressureView) -> None:
        for model in table.routed:
            model.engine.engine_core.relieve(view.moves)

    pressure = PressureFollower(relieve)

    async def follow() -> None:
        pressure.start()
        await asyncio.gather(follower.run(), *([keys.follow()] if keys is not None else []))

    api = build_api(table, layer, MetricsEndpoint(metrics, peers), reports.read, follow, peers)
    guard(api, settings.http.limits, keys)
    return Ingress(table, ledger, metrics, api)


def guard(api: Starlette, limits: HttpLimits, keys: KeyRing | None) -> None:
    """Put the layers in front that look at who sends what. Keys come before bodies: of a stranger none is read."""
    api.add_middleware(BodyLimits, max_body_bytes=limits.max_body_bytes, max_sequences=limits.max_sequences)
    if keys is not None:
        api.add_middleware(AuthLayer, keys=keys)
    api.add_middleware(PlainPaths)


def _keys(settings: ClusterConfig, own_keys: Sequence[ApiKey]) -> KeyRing | None:
    if settings.auth.keys_file is None:
        return None
    names = [one.name for one in settings.slo]
    return KeyRing(Path(settings.auth.keys_file), names, settings.http.ingress_replicas, own_keys)


def vllm_args(model: ApiModel) -> Namespace:
    """vLLM's server arguments: its defaults but for what the cluster decides."""
    line = ["--model", model.spec.model_path, "--served-model-name", model.spec.model_name]
    line += ["--enable-server-load-tracking"]
    if model.tool_call_parser is not None:
        line += ["--enable-auto-tool-choice", "--tool-call-parser", model.tool_call_parser]
    if model.reasoning_parser is not None:
        line += ["--reasoning-parser", model.reasoning_parser]
    args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(line)  # type: ignore[no-untyped-call]
    return args


async def _serve(model: ApiModel, settings: ClusterConfig, replica_limit: int) -> ServedModel:
    """One model's engine and API. Raises what vLLM raises for settings it refuses."""
    config = build_engine_args(model.spec).create_engine_config(UsageContext.OPENAI_API_SERVER)
    args = vllm_args(model)
    handle = await asyncio.to_thread(
        serve.get_deployment_handle, ENGINE_DEPLOYMENT, model_app_name(model.spec.model_name)
    )
    info = await first_info(handle)
    _learn(config, info)
    seqs = min(model.spec.max_num_seqs, replica_limit)
    door = open_door(settings.slo, settings.admission, seqs, model.replicas, settings.http.ingress_replicas)
    routers = settings.http.ingress_replicas
    core = ClusterCore(
        model.spec.model_name, handle, info, model.replicas, replica_limit, door, model.may_rest, routers
    )
    await core.open(get_node_ip_address())  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    engine = ClusterEngine(config, core, [stat_logger_in(registry)])
    tasks = await engine.get_supported_tasks()
    app = build_vllm_app(args, tasks, engine.model_config)
    answer_malformed(app)
    await init_app_state(engine, app.state, args, tasks)
    return ServedModel(model.spec.model_name, engine, app, registry, handle.shutdown_async)


async def first_info(handle: DeploymentHandle[Any]) -> ReplicaInfo:
    """What a replica says of itself, once there is one. A model that was removed a moment ago and is served again is
    unavailable until Ray Serve has told this process of the new one. Raises DeploymentUnavailableError where it does
    not."""
    deadline_s = time.monotonic() + _SUCCESSOR_S
    while True:
        try:
            info: ReplicaInfo = await handle.info.remote()
            return info
        except DeploymentUnavailableError:
            if time.monotonic() > deadline_s:
                raise
        await asyncio.sleep(_AGAIN_S)


def _learn(config: VllmConfig, info: ReplicaInfo) -> None:
    """Take over what the engine found out at its start, as vLLM's own client does from its engine's ready message."""
    config.model_config.max_model_len = min(config.model_config.max_model_len, info.max_model_len)
    config.cache_config.num_gpu_blocks = info.kv_blocks
    config.cache_config.block_size = info.block_tokens
