"""Every Kubernetes object of a cluster. The Helm chart in deploy/helm makes the same ones; a test compares them."""

import re

from cluster.config import ClusterConfig, looks_like_path
from cluster.deploy.ray_service import DASHBOARD_PORT, METRICS_PORT, Manifest, labels, ray_service
from cluster.deploy.settings import DeploySettings
from memory_agent.errors import SettingsError

_MAX_NAME = 47
_MAX_CONFIG_MAP_BYTES = 1 << 20
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


def render(name: str, config: ClusterConfig, settings: DeploySettings) -> list[Manifest]:
    """The objects, the RayService first. Raises SettingsError for a name that KubeRay refuses, and for more
    dashboards or rules than an object holds."""
    if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
        raise SettingsError(
            f"{name!r} is no name for a RayService: at most {_MAX_NAME} of a-z, 0-9 and -, beginning with a letter"
        )
    found = [ray_service(name, config, settings), _disruption_budget(name)]
    if settings.network_policy.enabled:
        found.append(_network_policy(name, config, settings))
    if settings.pod_monitor:
        found += [_pod_monitor(name, "ray", None, "metrics"), _pod_monitor(name, "api", "worker", "serve")]
    if settings.dashboards:
        found.append(_config_map(name, "dashboards", settings.dashboards, {"grafana_dashboard": "1"}))
    if settings.alert_rules:
        found.append(_config_map(name, "alert-rules", settings.alert_rules, {}))
    return found


def notes(config: ClusterConfig, settings: DeploySettings) -> list[str]:
    """What the operator should know of these objects, one line each."""
    if keys := config.auth.keys_file:
        lines = [f"{keys} has to be in every worker's pod: mount a Secret there (worker.volumes, worker.volumeMounts)"]
    elif settings.network_policy.enabled:
        lines = [
            "the API listens on all addresses of its pod and asks for no key: the NetworkPolicy says who reaches it"
        ]
    else:
        lines = ["the API listens on all addresses of its pod, asks for no key, and no NetworkPolicy guards it"]
    for model in config.models:
        if looks_like_path(model.source):
            lines.append(f"{model.name}: the folder {model.source} has to be in every worker's pod (storage.claimName)")
    return lines


def _disruption_budget(name: str) -> Manifest:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": f"{name}-worker", "labels": labels(name)},
        # A number: Kubernetes accepts nothing else for pods whose owner cannot be scaled.
        "spec": {
            "minAvailable": 1,
            "selector": {"matchLabels": labels(name, "worker")},
        },
    }


def _network_policy(name: str, config: ClusterConfig, settings: DeploySettings) -> Manifest:
    values, api = settings.network_policy, config.http.port
    clients = [{"from": values.api_clients, "ports": _tcp(api)}] if values.api_clients else []  # none would be all
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "labels": labels(name)},
        "spec": {
            "podSelector": {"matchLabels": labels(name)},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": {"matchLabels": labels(name)}}]},
                *clients,
                {"from": [_namespace(values.operator_namespace)], "ports": _tcp(DASHBOARD_PORT)},
                {"from": [_namespace(values.monitoring_namespace)], "ports": _tcp(METRICS_PORT, api)},
            ],
        },
    }


def _namespace(name: str) -> Manifest:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def _tcp(*ports: int) -> list[Manifest]:
    return [{"protocol": "TCP", "port": port} for port in ports]


def _pod_monitor(name: str, what: str, component: str | None, port: str) -> Manifest:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": f"{name}-{what}", "labels": labels(name)},
        "spec": {
            "selector": {"matchLabels": labels(name, component)},
            "podMetricsEndpoints": [{"port": port, "path": "/metrics"}],
        },
    }


def _config_map(name: str, what: str, files: dict[str, str], more: dict[str, str]) -> Manifest:
    if sum(len(text.encode()) for text in files.values()) > _MAX_CONFIG_MAP_BYTES:
        raise SettingsError(f"{what} take more than the 1 MiB that a ConfigMap holds: install fewer, or elsewhere")
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-{what}", "labels": labels(name) | more},
        "data": files,
    }
