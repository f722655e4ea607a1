"""Checks Kubernetes objects as strictly as they can be without a cluster."""

import copy
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from pydantic import BaseModel
from ray.serve.schema import ServeDeploySchema

from cluster.config import ClusterConfig
from cluster.config_file import validated
from cluster.serve_app import IMPORT_PATH

CRD_FILE = "ray.io_rayservices.crd.yaml"
POD_MONITOR_KEYS = {"selector": {"matchLabels"}, "podMetricsEndpoints": {"port", "path"}}


def crd_path() -> Path | None:
    """KubeRay's RayService CRD: in the folder that KUBERAY_CRDS names, or beside this repository."""
    folders = [os.environ.get("KUBERAY_CRDS"), *(str(up / "shared/data/kuberay") for up in Path(__file__).parents)]
    return next((path for one in folders if one and (path := Path(one) / CRD_FILE).is_file()), None)


@lru_cache
def _ray_service_schema(path: Path) -> dict[str, Any]:
    crd = yaml.load(path.read_text(), yaml.CSafeLoader)
    schema = next(
        version["schema"]["openAPIV3Schema"] for version in crd["spec"]["versions"] if version["name"] == "v1"
    )
    return strict(schema)


def strict(schema: Any) -> Any:
    """``schema`` without room for unknown keys, and with Kubernetes' integer-or-string in JSON Schema's words."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema:
        open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
        if not open_ended:
            found["additionalProperties"] = False
    return found


def check_crd(manifest: dict[str, Any]) -> None:
    """A RayService as KubeRay knows it. Skips where the CRD is not at hand."""
    path = crd_path()
    if path is None:
        pytest.skip(f"KubeRay's {CRD_FILE} is not here: name its folder in KUBERAY_CRDS")
    checked = {key: value for key, value in manifest.items() if key != "metadata"}  # the API server's own
    jsonschema.Draft202012Validator(_ray_service_schema(path)).validate({**checked, "metadata": {}})


def check_ray_service(manifest: dict[str, Any]) -> ClusterConfig:
    """What Kubernetes, Ray Serve or the cluster would find wrong in a RayService later; returns the configuration in
    it."""
    cluster = manifest["spec"]["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        check_pod(group["template"])
    return check_serve_config(manifest["spec"]["serveConfigV2"])


def check_pod(template: dict[str, Any]) -> None:
    """A pod's template, as Kubernetes itself knows pods: the CRD's copy is shallow in places."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p", **template["metadata"]},
        "spec": template["spec"],
    }
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def check_serve_config(text: str) -> ClusterConfig:
    """Ray Serve ignores keys that it does not know: every key has to be a field of its schema."""
    tree = yaml.safe_load(text)
    unknown = list(unknown_keys(ServeDeploySchema.model_validate(copy.deepcopy(tree)), tree))
    assert not unknown, unknown
    (application,) = tree["applications"]
    assert application["import_path"] == IMPORT_PATH
    return validated(application["args"], "args")


def unknown_keys(model: BaseModel, tree: dict[str, Any], at: str = "") -> list[str]:
    """Dotted paths of keys that are no field of the pydantic model that took them."""
    found = []
    for key, value in tree.items():
        if key not in type(model).model_fields:
            found.append(f"{at}{key}")
            continue
        taken = getattr(model, key)
        if isinstance(taken, BaseModel):
            found += unknown_keys(taken, value, f"{at}{key}.")
        elif isinstance(taken, list):
            pairs = zip(taken, value, strict=True)
            found += [
                path
                for number, (one, part) in enumerate(pairs)
                if isinstance(one, BaseModel)
                for path in unknown_keys(one, part, f"{at}{key}[{number}].")
            ]
    return found


def check_object(manifest: dict[str, Any]) -> None:
    """Any object of ours but the RayService."""
    if manifest["kind"] == "PodMonitor":  # not built in, and no schema of it is at hand: keys as documented
        assert manifest["apiVersion"] == "monitoring.coreos.com/v1"
        assert set(manifest["spec"]) == set(POD_MONITOR_KEYS)
        assert set(manifest["spec"]["selector"]) == POD_MONITOR_KEYS["selector"]
        assert all(
            set(one) == POD_MONITOR_KEYS["podMetricsEndpoints"] for one in manifest["spec"]["podMetricsEndpoints"]
        )
        return
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
