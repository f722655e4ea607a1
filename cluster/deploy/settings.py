"""How a cluster is installed on Kubernetes: the values of the Helm chart beside its configuration.

`ellm deploy render --values FILE` and `helm install --values FILE` take the same file. The chart's schema of values is
printed from here:

    python -m cluster.deploy.settings > deploy/helm/ellm-cluster/values.schema.json
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from cluster.config import ClusterConfig
from cluster.config_file import ConfigError

Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|[kMGTP]|[KMGTP]i)?$")]
"""Kubernetes' notation: "500m", "16Gi"."""
_QUANTITY_UNITS = {"": 1.0, "m": 1e-3, "k": 1e3, "K": 1e3} | {
    f"{prefix}{suffix}": float(base**power)
    for power, prefix in enumerate("KMGTP", start=1)
    for suffix, base in (("", 1000), ("i", 1024))
}
_Labels = dict[str, str]
_Objects = list[dict[str, Any]]


def quantity(text: str) -> float:
    """The number that a ``Quantity`` stands for: CPUs, or bytes."""
    number = text.rstrip("mkKMGTPi")
    return float(number) * _QUANTITY_UNITS[text.removeprefix(number)]


class _Values(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        use_attribute_docstrings=True,
        alias_generator=to_camel,
        populate_by_name=True,
    )


class ImageValues(_Values):
    """Of all pods. Its Ray has to be of ``rayVersion``."""

    repository: str = Field(default="ellm-cluster", min_length=1)
    """Registry and name; build it from deploy/docker."""
    tag: str = Field(default="0.1.0-gpu", min_length=1)
    """Of the GPU image; the CPU image is 0.1.0-cpu."""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """Kubernetes' imagePullPolicy."""
    pull_secrets: list[str] = Field(default_factory=list)
    """Secrets for a private registry."""


class HeadValues(_Values):
    """The pod of Ray's control store, dashboard and Serve's controller. It runs no replica."""

    cpu: Quantity = "2"
    """Requested CPUs."""
    memory: Quantity = "8Gi"
    """Requested memory, and its limit."""
    node_selector: _Labels = Field(default_factory=dict)
    """Labels of its node."""
    tolerations: _Objects = Field(default_factory=list)
    """Of its node's taints."""


class WorkerValues(_Values):
    """The pods with the API, the control actors and the engines."""

    replicas: int = Field(default=1, ge=1)
    """Pods. Only 1 works yet: a cluster has one device."""
    gpus: Literal[0, 1] = 1
    """GPUs of a pod: nvidia.com/gpu. 0 with the CPU image."""
    cpu: Quantity = "8"
    """Requested CPUs."""
    memory: Quantity = "48Gi"
    """Requested memory, and its limit: processes, host buffers, on CPU also weights and KV memory."""
    node_selector: _Labels = Field(default_factory=dict)
    """Labels of its node."""
    tolerations: _Objects = Field(default_factory=list)
    """Of its node's taints; a GPU's own is always tolerated."""
    volumes: _Objects = Field(default_factory=list)
    """Further volumes, such as a Secret with files that the configuration names."""
    volume_mounts: _Objects = Field(default_factory=list)
    """Where they are."""
    termination_grace_seconds: int = Field(default=660, ge=60)
    """From the eviction of a pod to its end: for requests that it has to go on to theirs."""

    @model_validator(mode="after")
    def _one_node(self) -> Self:
        if self.replicas > 1:
            raise ValueError(
                f"replicas: {self.replicas}; several nodes are not supported yet, only 1 works: all replicas of all "
                "models share its device. For more devices install a cluster for each, behind a gateway"
            )
        return self


class StorageValues(_Values):
    """Where checkpoints are kept. Without a claim each pod downloads its own."""

    claim_name: str | None = None
    """A PersistentVolumeClaim; while KubeRay replaces a Ray cluster two pods mount it."""
    size: Quantity = "100Gi"
    """Most that a pod downloads where there is no claim."""
    token_secret: str | None = None
    """Secret with the key HF_TOKEN, for gated or private models."""


class FaultToleranceValues(_Values):
    """What Ray's control store is recovered from when the head's pod is replaced."""

    enabled: bool = True
    """false: the loss of the head's pod is the loss of the cluster."""
    redis_address: str | None = None
    """host:port of a Redis. null: RocksDB in a volume of KubeRay's making."""
    redis_password_secret: str | None = None
    """Secret with the key password."""
    storage_size: Quantity = "2Gi"
    """Of the volume."""
    storage_class_name: str | None = None
    """Of the volume. null: the default class."""

    @model_validator(mode="after")
    def _password_of_a_redis(self) -> Self:
        if self.redis_password_secret is not None and self.redis_address is None:
            raise ValueError("redisPasswordSecret is of a Redis: set redisAddress too")
        return self


class NetworkPolicyValues(_Values):
    """Who may connect to the pods. They may connect to each other, and to everything outside."""

    enabled: bool = True
    """false: everybody."""
    api_clients: _Objects = Field(default_factory=lambda: [{"podSelector": {}}])
    """NetworkPolicyPeers that reach the API. Left out: the pods of the namespace. Empty: nobody."""
    operator_namespace: str = "kuberay-system"
    """Where KubeRay runs, which reaches the dashboard's port."""
    monitoring_namespace: str = "monitoring"
    """Where Prometheus runs, which reaches the metrics' ports."""


class DeploySettings(_Values):
    """Values beside ``cluster``."""

    image: ImageValues = Field(default_factory=ImageValues)
    """The image."""
    ray_version: str = Field(default="2.60.0", pattern=r"^\d+\.\d+\.\d+$")
    """Of Ray in the image."""
    head: HeadValues = Field(default_factory=HeadValues)
    """Ray's head."""
    worker: WorkerValues = Field(default_factory=WorkerValues)
    """Ray's workers."""
    storage: StorageValues = Field(default_factory=StorageValues)
    """Checkpoints."""
    fault_tolerance: FaultToleranceValues = Field(default_factory=FaultToleranceValues)
    """Of Ray's control store."""
    network_policy: NetworkPolicyValues = Field(default_factory=NetworkPolicyValues)
    """Who may connect."""
    pod_monitor: bool = False
    """true: PodMonitors for the Prometheus operator, whose kinds have to be installed."""
    dashboards: dict[str, str] = Field(default_factory=dict)
    """Grafana dashboards by file name, for Grafana's sidecar: what `ellm dashboards export` writes."""
    alert_rules: dict[str, str] = Field(default_factory=dict)
    """Prometheus rule files by file name, as a ConfigMap."""

    @model_validator(mode="after")
    def _image_of_the_device(self) -> Self:
        if self.worker.gpus and self.image.tag.endswith("-cpu"):
            raise ValueError("image.tag is that of a CPU image, which uses no GPU: set worker.gpus to 0")
        return self


def load_settings(path: Path | None) -> DeploySettings:
    """The values in the file ``path``, whose key ``cluster`` is not read; the defaults without a file. Raises
    ConfigError."""
    if path is None:
        return DeploySettings()
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} should hold keys such as image: and worker:")
    try:
        return DeploySettings.model_validate({key: value for key, value in tree.items() if key != "cluster"})
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, item['loc'])) or 'the whole'}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors(include_url=False)
        ]
        raise ConfigError(f"{path} does not fit:\n" + "\n".join(lines)) from error


def with_exported(settings: DeploySettings, folder: Path) -> DeploySettings:
    """``settings`` with the dashboards (*.json) and rules (*.yml, *.yaml) of a folder that `ellm dashboards export` has
    written. Raises ConfigError."""
    found: dict[str, dict[str, str]] = {"dashboards": {}, "alert_rules": {}}
    try:
        for path in sorted(folder.rglob("*")):
            kind = {".json": "dashboards", ".yml": "alert_rules", ".yaml": "alert_rules"}.get(path.suffix)
            if kind:
                found[kind][path.name] = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {folder}: {error}") from error
    if not any(found.values()):
        raise ConfigError(f"{folder} holds neither dashboards (*.json) nor rules (*.yml): is it a folder?")
    return settings.model_copy(update={key: {**getattr(settings, key), **files} for key, files in found.items()})


class _ChartValues(DeploySettings):
    """Values of the Helm chart."""

    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    """The content of a cluster.yaml."""


def values_schema() -> str:
    """JSON Schema of the chart's values. What it cannot say of them (``worker.replicas``, bounds against each other)
    the chart and the cluster themselves check."""
    schema = _ChartValues.model_json_schema(by_alias=True)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["properties"]["global"] = {"type": "object", "description": "Helm's own."}
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    sys.stdout.write(values_schema())
