"""The RayService of a cluster: Ray's pods, and the configuration with which Ray Serve starts the cluster in them.

head      Ray's control store, dashboard, Serve's controller; no CPUs, so no replica
workers   API, control actors, engines: `/dev/shm` holds the object store, lease boards and host buffers
"""

import hashlib
import json
from typing import Any

import yaml

from cluster.app import APP_NAME
from cluster.config import ClusterConfig
from cluster.config_file import validated
from cluster.deploy.settings import DeploySettings, quantity
from cluster.serve_app import IMPORT_PATH
from cluster.sizing import MIB
from cluster.start_stages import OBJECT_STORE_BYTES, PROCESS_ENVIRONMENT, RAY_CPUS
from memory_agent.errors import SettingsError

SHARED_MEMORY_MIB = OBJECT_STORE_BYTES // MIB + 384
"""Of a worker without host buffers: the object store, lease boards, the models' file, vLLM's own queues."""
DASHBOARD_PORT, METRICS_PORT, GCS_PORT = 8265, 8080, 6379
USER_ID = 1000
HOME, MODELS = "/home/ellm", "/models"
_DRAIN_MARGIN_S = 30
# Of the API, which listens when it has every model that serves; so it asks for no key, and needs no TLS.
_READY = {"periodSeconds": 5, "timeoutSeconds": 3, "failureThreshold": 2}
_ENVIRONMENT = {name: value for name, value in PROCESS_ENVIRONMENT.items() if name != "RAY_AUTH_MODE"} | {
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    "HF_HOME": MODELS,
    "HOME": HOME,
}
"""KubeRay sets Ray's authentication."""

Manifest = dict[str, Any]


class _Dumper(yaml.SafeDumper):
    """For people: text of several lines as a block, and nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def to_yaml(*documents: Manifest) -> str:
    """The documents, in their order."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, explicit_start=len(documents) > 1)


def labels(name: str, component: str | None = None) -> dict[str, str]:
    """Of every object of the cluster ``name``, and of its pods, which are selected by them."""
    found = {"app.kubernetes.io/name": "ellm-cluster", "app.kubernetes.io/instance": name}
    return found | ({"app.kubernetes.io/component": component} if component else {})


def serve_config(config: ClusterConfig) -> dict[str, Any]:
    """What Ray Serve is told, a ServeDeploySchema: the configuration, but that the API listens on all addresses of its
    pod, where the NetworkPolicy guards it if there are no keys. Raises ConfigError where it does not fit that."""
    args: dict[str, Any] = config.model_dump(exclude_unset=True)
    args["http"] = {**args.get("http", {}), "host": "0.0.0.0", "port": config.http.port}
    if config.auth.keys_file is None:
        args["auth"] = {**args.get("auth", {}), "allow_open": True}
    validated(args, "the configuration with an API that listens on all addresses")
    application = {"name": APP_NAME, "route_prefix": None, "import_path": IMPORT_PATH, "args": args}
    return {"proxy_location": "Disabled", "applications": [application]}


def shared_memory_mib(config: ClusterConfig) -> int:
    """Of a worker's /dev/shm, where every replica may run: it counts against the pod's memory."""
    buffers = [model.most_replicas for model in config.models if model.elastic]
    return SHARED_MEMORY_MIB + -(-sum(buffers) * (config.memory.host_buffer or 0) // MIB)


def ray_service(name: str, config: ClusterConfig, settings: DeploySettings) -> Manifest:
    """The object. Raises SettingsError where the worker's memory does not hold what is in its shared memory."""
    serve = serve_config(config)
    digest = hashlib.sha256(json.dumps(serve, sort_keys=True).encode()).hexdigest()
    worker = settings.worker
    if quantity(worker.memory) <= (shared := shared_memory_mib(config)) * MIB:
        raise SettingsError(
            f"worker.memory is {worker.memory}, and the shared memory of its pod, which counts against it, {shared}Mi: "
            "give it more, or less to memory.host_buffer"
        )
    cluster: Manifest = {
        "rayVersion": settings.ray_version,
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "securityContext": _container_security(),
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, {"name": "home", "mountPath": HOME}],
            "resources": {"requests": {"cpu": "200m", "memory": "512Mi"}, "limits": {"memory": "1Gi"}},
        },
        "headGroupSpec": {
            "rayStartParams": {
                "num-cpus": "0",
                "num-gpus": "0",
                "dashboard-host": "0.0.0.0",
                "object-store-memory": str(OBJECT_STORE_BYTES),
            },
            "template": _head_pod(name, digest, config, settings),
        },
        "workerGroupSpecs": [
            {
                "groupName": "worker",
                "replicas": worker.replicas,
                "minReplicas": worker.replicas,
                "maxReplicas": worker.replicas,
                "rayStartParams": {"num-cpus": str(RAY_CPUS), "object-store-memory": str(OBJECT_STORE_BYTES)},
                "template": _worker_pod(name, digest, config, settings),
            }
        ],
    }
    if settings.fault_tolerance.enabled:
        cluster["gcsFaultToleranceOptions"] = _fault_tolerance(settings)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": name, "labels": labels(name)},
        "spec": {
            "upgradeStrategy": {"type": "NewCluster"},
            "excludeHeadPodFromServeSvc": True,
            "serveConfigV2": to_yaml(serve),
            "rayClusterConfig": cluster,
        },
    }


def _head_pod(name: str, digest: str, config: ClusterConfig, settings: DeploySettings) -> Manifest:
    head = settings.head
    ports = {"gcs": GCS_PORT, "dashboard": DASHBOARD_PORT, "metrics": METRICS_PORT, "serve": config.http.port}
    resources = {"requests": {"cpu": head.cpu, "memory": head.memory}, "limits": {"memory": head.memory}}
    container = _container("ray-head", settings, ports, resources)
    return _pod(name, "head", digest, settings, container, head.node_selector, head.tolerations, SHARED_MEMORY_MIB)


def _worker_pod(name: str, digest: str, config: ClusterConfig, settings: DeploySettings) -> Manifest:
    worker, port = settings.worker, config.http.port
    limits, tolerations = {"memory": worker.memory}, worker.tolerations
    if worker.gpus:
        limits["nvidia.com/gpu"] = str(worker.gpus)
        tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}, *tolerations]
    resources = {"requests": {"cpu": worker.cpu, "memory": worker.memory}, "limits": limits}
    container = _container("ray-worker", settings, {"metrics": METRICS_PORT, "serve": port}, resources)
    container["volumeMounts"] += [{"name": "models", "mountPath": MODELS}, *worker.volume_mounts]
    if secret := settings.storage.token_secret:
        container["env"].append(
            {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": secret, "key": "HF_TOKEN"}}}
        )
    container["readinessProbe"] = {"tcpSocket": {"port": "serve"}, **_READY}
    within = worker.termination_grace_seconds - _DRAIN_MARGIN_S
    drain = ["python", "-m", "cluster.deploy.drain", "--within", str(within), "--port", str(port)]
    container["lifecycle"] = {"preStop": {"exec": {"command": drain}}}
    shared = shared_memory_mib(config)
    pod = _pod(name, "worker", digest, settings, container, worker.node_selector, tolerations, shared)
    claim, size = settings.storage.claim_name, settings.storage.size
    source: Manifest = {"persistentVolumeClaim": {"claimName": claim}} if claim else {"emptyDir": {"sizeLimit": size}}
    pod["spec"]["volumes"] += [{"name": "models", **source}, *worker.volumes]
    pod["spec"]["terminationGracePeriodSeconds"] = worker.termination_grace_seconds
    pod["spec"]["automountServiceAccountToken"] = False  # the head's autoscaler alone talks to Kubernetes
    return pod


def _pod(
    name: str,
    component: str,
    digest: str,
    settings: DeploySettings,
    container: Manifest,
    node_selector: dict[str, str],
    tolerations: list[dict[str, Any]],
    shared_mib: int,
) -> Manifest:
    """digest: of the configuration, so that KubeRay makes a new cluster where it has changed."""
    spec: Manifest = {
        "restartPolicy": "Never",  # the autoscaler replaces pods
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shared_mib}Mi"}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "home", "emptyDir": {}},
        ],
    }
    if settings.image.pull_secrets:
        spec["imagePullSecrets"] = [{"name": secret} for secret in settings.image.pull_secrets]
    if node_selector:
        spec["nodeSelector"] = node_selector
    if tolerations:
        spec["tolerations"] = tolerations
    metadata = {"labels": labels(name, component), "annotations": {"ellm/config-digest": digest}}
    return {"metadata": metadata, "spec": spec}


def _container(name: str, settings: DeploySettings, ports: dict[str, int], resources: Manifest) -> Manifest:
    image = settings.image
    return {
        "name": name,
        "image": f"{image.repository}:{image.tag}",
        "imagePullPolicy": image.pull_policy,
        "ports": [{"name": port, "containerPort": number} for port, number in ports.items()],
        "resources": resources,
        "env": [{"name": key, "value": value} for key, value in _ENVIRONMENT.items()],
        "securityContext": _container_security(),
        "volumeMounts": [
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "home", "mountPath": HOME},
        ],
    }


def _container_security() -> Manifest:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "runAsUser": USER_ID,
        "capabilities": {"drop": ["ALL"]},
    }


def _fault_tolerance(settings: DeploySettings) -> Manifest:
    values = settings.fault_tolerance
    if values.redis_address is None:
        storage: Manifest = {"size": values.storage_size, "deletionPolicy": "DeleteWithCluster"}
        if values.storage_class_name is not None:
            storage["storageClassName"] = values.storage_class_name
        return {"backend": "rocksdb", "storage": storage}
    options: Manifest = {"backend": "redis", "redisAddress": values.redis_address}
    if values.redis_password_secret is not None:
        secret = {"name": values.redis_password_secret, "key": "password"}
        options["redisPassword"] = {"valueFrom": {"secretKeyRef": secret}}
    return options
