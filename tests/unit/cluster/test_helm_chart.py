"""The Helm chart makes the objects that `ellm deploy render` makes. `make helm` installs the binary that this needs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config_file import validated
from cluster.deploy.manifests import render
from cluster.deploy.settings import DeploySettings
from tests.unit.cluster.test_deploy_manifests import CHART, MODELS, VALUES

DIGEST = "ellm/config-digest"
SIZES = [1048576, "512MiB", "1.5GiB", "2 GB", "auto", None]


@pytest.fixture(scope="module")
def helm() -> str:
    """Helm: what HELM names, or beside this interpreter, or on the path."""
    found = (
        os.environ.get("HELM") or shutil.which("helm", path=str(Path(sys.executable).parent)) or shutil.which("helm")
    )
    if not found:
        pytest.skip("no helm here: `make helm` installs it, or name the binary in HELM")
    return found


def run(helm: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [helm, *arguments], capture_output=True, text=True, check=False, timeout=60, env={"HOME": str(home), "PATH": ""}
    )


def template(helm: str, home: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Objects of the release ``chat`` by kind and name."""
    file = home / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    done = run(helm, home, "template", "chat", str(CHART), "--values", str(file))
    assert done.returncode == 0, done.stderr
    return by_name([one for one in yaml.safe_load_all(done.stdout) if one])


def by_name(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    return {f"{one['kind']} {one['metadata']['name']}": plain(one) for one in manifests}


def plain(manifest: dict[str, Any]) -> dict[str, Any]:
    """Without what the two write differently: the digest, and how the configuration is spelt."""
    if manifest["kind"] != "RayService":
        return manifest
    spec = manifest["spec"]
    cluster = spec["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert len(group["template"]["metadata"]["annotations"].pop(DIGEST)) == 64
    serve = yaml.safe_load(spec["serveConfigV2"])
    for application in serve["applications"]:
        application["args"] = validated(application["args"], "args").model_dump()
    return manifest | {"spec": spec | {"serveConfigV2": serve}}


def test_lint(helm: str, tmp_path: Path) -> None:
    """Strict: a warning fails."""
    done = run(helm, tmp_path, "lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", VALUES)
def test_the_chart_and_the_command_make_the_same_objects(helm: str, tmp_path: Path, case: str) -> None:
    """All of them, key by key; so what is checked of the one holds for the other."""
    cluster = yaml.safe_load(MODELS)
    ours = render("chat", validated(cluster, "test"), DeploySettings.model_validate(VALUES[case]))
    assert template(helm, tmp_path, {"cluster": cluster, **VALUES[case]}) == by_name(ours)


@pytest.mark.parametrize("size", SIZES)
def test_the_chart_reads_every_size(helm: str, tmp_path: Path, size: object) -> None:
    """The shared memory is as large as `ellm deploy render` makes it."""
    cluster = {"models": [{"source": "a/b", "replicas": 3}, {}], "memory": {"host_buffer": size}}
    ours = render("chat", validated(cluster, "test"), DeploySettings())
    assert template(helm, tmp_path, {"cluster": cluster}) == by_name(ours)


def test_the_charts_defaults_are_the_commands() -> None:
    """But for the model."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    values.pop("cluster")
    assert DeploySettings.model_validate(values) == DeploySettings()
    assert values == DeploySettings().model_dump(by_alias=True)


def test_another_configuration_has_another_digest(helm: str, tmp_path: Path) -> None:
    """Of the pods, so that KubeRay makes a new Ray cluster."""

    def digest(port: int) -> str:
        (tmp_path / "v.yaml").write_text(yaml.safe_dump({"cluster": {"http": {"port": port}}}))
        done = run(helm, tmp_path, "template", "chat", str(CHART), "--values", str(tmp_path / "v.yaml"))
        service = next(one for one in yaml.safe_load_all(done.stdout) if one and one["kind"] == "RayService")
        head = service["spec"]["rayClusterConfig"]["headGroupSpec"]
        return str(head["template"]["metadata"]["annotations"][DIGEST])

    assert digest(8000) == digest(8000) != digest(8001)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ("worker.gpu=1", "gpu"),
        ("worker.gpus=2", "gpus"),
        ("image.tag=0.1.0-cpu", "set worker.gpus to 0"),
        ("worker.replicas=4", "several nodes are not supported yet"),
        ("worker.memory=512Mi", "give it more"),
        ("cluster.modles=3", "modles"),
        ("cluster.http.port=70000", "port"),
        ("faultTolerance.redisPasswordSecret=s", "redisAddress"),
        ("cluster.memory.host_buffer=2 GiBi", "should be a size"),
    ],
)
def test_bad_values_are_refused(helm: str, tmp_path: Path, values: str, complaint: str) -> None:
    """By the chart's schema or by the chart, before anything is installed."""
    done = run(helm, tmp_path, "template", "chat", str(CHART), "--set", values)
    assert done.returncode != 0 and complaint in done.stderr


@pytest.mark.parametrize("name", ["c" * 48, "1chat", "chat.eu"])
def test_a_name_that_kuberay_refuses_is_refused(helm: str, tmp_path: Path, name: str) -> None:
    """Which it would only do when it is installed."""
    done = run(helm, tmp_path, "template", name, str(CHART))
    assert done.returncode != 0 and "at most 47" in done.stderr
