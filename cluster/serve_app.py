"""The cluster as an application that plain Ray Serve deploys: on KubeRay, or with `serve run` on any Ray.

    applications: [{name: ellm, route_prefix: null, import_path: cluster.serve_app:build, args: <a cluster.yaml>}]

    serve deploy --> application "ellm":  control (one replica)  --starts-->  controller, agent, registry (detached)
                                          api (the ingress)                   registry --deploys--> ellm-model:<m>

The control actors outlive the deployment ``control``, Serve's controller and the application: they end with the Ray
cluster. What they are started with is decided once. A ``control`` that is made again finds the registry and goes on
with it; one that finds none, because its node is gone, starts the models anew.
"""

import hashlib
import logging
import os
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve

from cluster.app import APP_NAME, MODEL_APPS, REPLICA_CPUS, build_api_app
from cluster.config import ClusterConfig
from cluster.config_file import validated
from cluster.device import device_environment, find_device
from cluster.model_registry import RegistrySpec
from cluster.preflight import check_platform
from cluster.registry_link import registry_actor
from cluster.start_stages import CONTROL_TIMEOUT_S, check_engines, read_models, size_cluster, start_control
from memory_agent.errors import SettingsError

CONTROL_DEPLOYMENT = "control"
IMPORT_PATH = "cluster.serve_app:build"

logger = logging.getLogger("ray.serve")


def build(args: dict[str, Any]) -> serve.Application:
    """The application; ``args`` is the content of a cluster.yaml. Raises ConfigError."""
    config = validated(dict(args), "args of the application")
    control = serve.deployment(
        name=CONTROL_DEPLOYMENT,
        num_replicas=1,
        health_check_period_s=2.0,
        max_constructor_retry_count=1,
        ray_actor_options={"num_cpus": REPLICA_CPUS},
    )(ClusterControl)
    return build_api_app(config, control.bind(config))


class ClusterControl:
    """Starts the control actors on its node, whose device the engines share, and has itself replaced where the registry
    is gone."""

    def __init__(self, config: ClusterConfig) -> None:
        """Raises SettingsError where the configuration does not fit the node, or Ray serves another one already, and
        DefaultModelError."""
        check_app_name(serve.get_replica_context().app_name)
        if (running := _running_config()) is None:
            _start(config, cluster_id_of(ray.get_runtime_context().get_session_name()))
        else:
            check_unchanged(running, config)
            logger.info("the model registry runs already: going on with its models")

    async def started(self) -> None:
        """Answers as soon as the registry has been started."""

    def check_health(self) -> None:
        """Called by Ray Serve, which makes this anew where it raises."""
        registry_actor()


def check_app_name(name: str) -> None:
    """Raises SettingsError for a name under which the cluster's parts would not find the API."""
    if name != APP_NAME:
        raise SettingsError(f"the application is named {name!r}; it has to be named {APP_NAME!r}: one cluster a Ray")


def check_unchanged(running: ClusterConfig, wanted: ClusterConfig) -> None:
    """Raises SettingsError, naming the sections that differ, where the cluster that runs was started with others."""
    before, after = running.model_dump(), wanted.model_dump()
    if changed := [section for section in after if before[section] != after[section]]:
        raise SettingsError(
            f"this Ray serves a configuration already that differs in: {', '.join(changed)}. Models are changed while "
            "they serve with `ellm models add|remove|limit`; for the rest start a new Ray cluster, which KubeRay does "
            "with what `ellm deploy render` prints"
        )


def cluster_id_of(session_name: str) -> str:
    """The same in every process and every life of one Ray cluster, and in no other."""
    return hashlib.sha256(session_name.encode()).hexdigest()[:8]


def _running_config() -> ClusterConfig | None:
    """What the registry that runs was started with; None where none does."""
    try:
        registry = registry_actor()
    except ValueError:
        return None
    config: ClusterConfig = ray.get(registry.configuration.remote(), timeout=CONTROL_TIMEOUT_S)
    return config


def _start(config: ClusterConfig, cluster_id: str) -> None:
    check_platform()
    device = find_device()
    os.environ.update(device_environment(device))
    _forget_former(RegistrySpec(cluster_id, device.name, config))
    facts = read_models(config, logger.info)
    sizing = size_cluster(config, device, facts, logger.info)
    check_engines(sizing, logger.info)
    start_control(config, cluster_id, device, sizing, logger.info)


def _forget_former(spec: RegistrySpec) -> None:
    """End the models of a registry that was lost, whose memory is not to count against the new ones."""
    applications: Mapping[str, Any] = serve.status().applications
    for name in [name for name in applications if name.startswith(MODEL_APPS)]:
        logger.warning("ending %s: the registry that started it is lost", name)
        serve.delete(name)
    spec.path.unlink(missing_ok=True)
