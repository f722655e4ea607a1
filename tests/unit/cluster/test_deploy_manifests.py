"""The Kubernetes objects of a cluster: valid, closed, and from the configuration that `ellm serve` takes."""

import copy
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from typer.testing import CliRunner

from cluster.cli import app
from cluster.config import ClusterConfig
from cluster.config_file import ConfigError, example_config, parse_config
from cluster.deploy.manifests import notes, render
from cluster.deploy.ray_service import SHARED_MEMORY_MIB, labels, shared_memory_mib
from cluster.deploy.settings import DeploySettings, load_settings, quantity, values_schema, with_exported
from memory_agent.errors import SettingsError
from tests.unit.cluster.kube_schema import check_crd, check_object, check_ray_service, check_serve_config
from tests.unit.cluster.test_cli import ellm

CHART = Path(__file__).parents[3] / "deploy/helm/ellm-cluster"
MODELS = """
models:
  - {source: Qwen/Qwen3-0.6B, replicas: 2}
  - {source: Qwen/Qwen3-4B, autoscaling_config: {min_replicas: 1, max_replicas: 3}}
memory: {budget: 8GiB, host_buffer: 512MiB}
http: {port: 9000}
"""
VALUES: dict[str, dict[str, Any]] = {
    "one GPU": {},
    "one CPU": {"image": {"tag": "0.1.0-cpu"}, "worker": {"gpus": 0, "memory": "16Gi"}},
    "chosen nodes": {
        "worker": {"nodeSelector": {"gpu": "h100"}, "tolerations": [{"key": "gpu", "operator": "Exists"}]}
    },
    "nobody": {"networkPolicy": {"apiClients": []}},
    "everything": {
        "image": {"pullSecrets": ["registry"]},
        "head": {"tolerations": [{"key": "head", "operator": "Exists"}], "nodeSelector": {"pool": "head"}},
        "worker": {
            "volumes": [{"name": "keys", "secret": {"secretName": "api-keys"}}],
            "volumeMounts": [{"name": "keys", "mountPath": "/etc/ellm", "readOnly": True}],
        },
        "storage": {"claimName": "checkpoints", "tokenSecret": "hub"},
        "faultTolerance": {"redisAddress": "redis:6379", "redisPasswordSecret": "redis"},
        "networkPolicy": {"apiClients": [{"namespaceSelector": {"matchLabels": {"team": "chat"}}}]},
        "podMonitor": True,
        "dashboards": {"cluster.json": "{}"},
        "alertRules": {"slo.yml": "groups: []"},
    },
}


def settings(values: dict[str, Any]) -> DeploySettings:
    return DeploySettings.model_validate(values)


def objects(values: dict[str, Any], config: str = MODELS) -> dict[str, Any]:
    found = render("chat", parse_config(config, "test"), settings(values))
    return {f"{one['kind']} {one['metadata']['name']}": one for one in found}


@pytest.mark.parametrize("case", VALUES)
def test_every_object_is_valid(case: str) -> None:
    """The pods of the RayService and the others by Kubernetes' own schemas, without room for a misspelt key, and the
    configuration in it is the one that was given, but for where the API listens, without keys."""
    manifests = render("chat", parse_config(MODELS, "test"), settings(VALUES[case]))
    for manifest in manifests[1:]:
        check_object(manifest)
    found = check_ray_service(manifests[0])
    given = parse_config(MODELS, "test")
    assert found.http.host == "0.0.0.0"
    assert found.model_dump(exclude={"http", "auth"}) == given.model_dump(exclude={"http", "auth"})
    assert found.auth.allow_open
    assert found.http.port == given.http.port


def test_keys_close_the_api() -> None:
    """With a keys file nothing is left open, and the operator is told that the pods need it."""
    config = parse_config("auth: {keys_file: /keys/keys.yaml}", "test")
    (service, *_) = render("chat", config, settings({}))
    found = check_ray_service(service)
    assert (found.auth.keys_file, found.auth.allow_open) == ("/keys/keys.yaml", False)
    assert any("/keys/keys.yaml has to be in every worker's pod" in line for line in notes(config, settings({})))


@pytest.mark.parametrize("case", VALUES)
def test_the_ray_service_is_valid(case: str) -> None:
    """By KubeRay's CRD, likewise."""
    check_crd(render("chat", parse_config(MODELS, "test"), settings(VALUES[case]))[0])


@pytest.mark.parametrize(
    "path",
    [
        ("spec", "upgradeStrateg"),
        ("spec", "rayClusterConfig", "rayVersio"),
        ("spec", "rayClusterConfig", "autoscalerOptions", "versio"),
        ("spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "securityContext", "runAsRoot"),
        ("spec", "rayClusterConfig", "gcsFaultToleranceOptions", "storage", "siz"),
    ],
)
def test_the_check_finds_a_misspelt_key(path: tuple[str, ...]) -> None:
    """Otherwise it would prove nothing."""
    manifest = copy.deepcopy(objects({})["RayService chat"])
    check_crd(manifest)
    here = manifest
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = "x"
    with pytest.raises(jsonschema.ValidationError):
        check_crd(manifest)


def test_the_check_of_pods_finds_a_misspelt_key() -> None:
    """Likewise, by Kubernetes' schemas."""
    manifest = copy.deepcopy(objects({})["RayService chat"])
    check_ray_service(manifest)
    manifest["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["hostNetwrk"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        check_ray_service(manifest)


@pytest.mark.parametrize("key", ["route_prefx", "deployments[0].num_replica", "proxy_locatio"])
def test_the_check_finds_a_key_that_serve_ignores(key: str) -> None:
    """Ray Serve accepts each of these and does nothing."""
    tree = yaml.safe_load(objects({})["RayService chat"]["spec"]["serveConfigV2"])
    place = tree if key == "proxy_locatio" else tree["applications"][0]
    if key.startswith("deployments"):
        place["deployments"] = [{"name": "api"}]
        place = place["deployments"][0]
    place[key.rpartition(".")[2]] = 1
    with pytest.raises(AssertionError, match=key.rpartition(".")[2]):
        check_serve_config(yaml.safe_dump(tree))


def test_the_head_does_no_work() -> None:
    """No CPUs, so Serve places no replica there; the pods behind the API's Service are workers alone."""
    spec = objects({})["RayService chat"]["spec"]
    assert spec["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["excludeHeadPodFromServeSvc"] is True


@pytest.mark.parametrize("case", VALUES)
def test_no_container_may_more_than_it_must(case: str) -> None:
    """Not root, nothing written outside of volumes, no capability, no escalation: Ray's autoscaler included."""
    cluster = objects(VALUES[case])["RayService chat"]["spec"]["rayClusterConfig"]
    pods = [cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"][0]["template"]]
    containers = [container for pod in pods for container in pod["spec"]["containers"]]
    for context in [one["securityContext"] for one in [*containers, cluster["autoscalerOptions"]]]:
        assert context["runAsNonRoot"] and context["readOnlyRootFilesystem"]
        assert not context["allowPrivilegeEscalation"] and context["capabilities"] == {"drop": ["ALL"]}
    for container in containers:
        assert {"/dev/shm", "/tmp", "/home/ellm"} <= {mount["mountPath"] for mount in container["volumeMounts"]}
    pods[0]["spec"]["containers"].append(cluster["autoscalerOptions"])  # KubeRay makes it a container of the head
    for pod in pods:
        mounted = {mount["name"] for one in pod["spec"]["containers"] for mount in one["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}


def test_gpus_are_asked_for_under_limits() -> None:
    """One of a GPU pod, none of a CPU pod."""
    for case, gpus in (("one GPU", "1"), ("one CPU", None)):
        worker = objects(VALUES[case])["RayService chat"]["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
        (container,) = worker["template"]["spec"]["containers"]
        assert container["resources"]["limits"].get("nvidia.com/gpu") == gpus


def test_shared_memory_holds_every_host_buffer() -> None:
    """Those of the most replicas of every elastic model, each in the worker's volume; a static model has none."""
    assert shared_memory_mib(parse_config(MODELS, "test")) == SHARED_MEMORY_MIB + (2 + 3) * 512
    static = MODELS.replace("replicas: 2}", "replicas: 2, elastic: false}")
    assert shared_memory_mib(parse_config(static, "test")) == SHARED_MEMORY_MIB + 3 * 512
    volumes = objects({})["RayService chat"]["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
    shared = next(one for one in volumes["volumes"] if one["name"] == "shared-memory")["emptyDir"]
    assert shared == {"medium": "Memory", "sizeLimit": f"{SHARED_MEMORY_MIB + 5 * 512}Mi"}


def test_shared_memory_has_to_fit_into_the_pod() -> None:
    """It counts against the pod's memory; more of it would end the pod when it fills."""
    with pytest.raises(SettingsError, match=r"worker\.memory is 3Gi, .* 3072Mi: give it more, or less to memory\.host"):
        objects({"worker": {"memory": "3Gi"}})
    assert objects({"worker": {"memory": "4Gi"}})


@pytest.mark.parametrize(
    ("text", "number"), [("2", 2), ("500m", 0.5), ("1.5G", 1.5e9), ("16Gi", 16 << 30), ("3k", 3e3), ("1P", 1e15)]
)
def test_quantities(text: str, number: float) -> None:
    """As Kubernetes reads them."""
    assert quantity(text) == number


def test_a_worker_is_ready_when_its_api_listens() -> None:
    """By the port that the Service leads to."""
    worker = objects({})["RayService chat"]["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    (container,) = worker["template"]["spec"]["containers"]
    assert container["readinessProbe"]["tcpSocket"] == {"port": "serve"}
    assert {"name": "serve", "containerPort": 9000} in container["ports"]
    assert worker["replicas"] == worker["minReplicas"] == worker["maxReplicas"] == 1


def test_a_worker_is_drained_before_it_is_stopped() -> None:
    """The hook ends before Kubernetes' patience does."""
    worker = objects({"worker": {"terminationGraceSeconds": 300}})["RayService chat"]["spec"]["rayClusterConfig"]
    pod = worker["workerGroupSpecs"][0]["template"]["spec"]
    command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert command[:3] == ["python", "-m", "cluster.deploy.drain"]
    assert int(command[command.index("--within") + 1]) < pod["terminationGracePeriodSeconds"] == 300
    assert command[command.index("--port") + 1] == "9000"


def test_another_configuration_is_another_cluster() -> None:
    """KubeRay makes a new Ray cluster where the pods' annotation differs, and only there."""

    def digest(config: str) -> str:
        pods = objects({}, config)["RayService chat"]["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]
        return str(pods["metadata"]["annotations"]["ellm/config-digest"])

    assert digest(MODELS) == digest(MODELS + "\n# a comment\n")
    assert digest(MODELS) != digest(MODELS.replace("budget: 8GiB", "budget: 9GiB"))


def test_who_reaches_the_pods() -> None:
    """Each other everywhere; clients the API alone; the operator the dashboard; Prometheus the metrics."""
    policy = objects(VALUES["everything"])["NetworkPolicy chat"]["spec"]
    assert policy["podSelector"]["matchLabels"] == labels("chat")
    inside, clients, operator, monitoring = policy["ingress"]
    assert "ports" not in inside and inside["from"] == [{"podSelector": {"matchLabels": labels("chat")}}]
    assert clients["from"] == [{"namespaceSelector": {"matchLabels": {"team": "chat"}}}]
    ports = [[port["port"] for port in rule["ports"]] for rule in (clients, operator, monitoring)]
    assert ports == [[9000], [8265], [8080, 9000]]
    assert "NetworkPolicy chat" not in objects({"networkPolicy": {"enabled": False}})


def test_no_clients_are_nobody() -> None:
    """Where Kubernetes takes a rule with an empty list of peers for everybody."""
    rules = objects(VALUES["nobody"])["NetworkPolicy chat"]["spec"]["ingress"]
    assert all(rule["from"] for rule in rules)
    assert [port for rule in rules[1:] for port in rule["ports"] if port["port"] == 9000] == [
        {"protocol": "TCP", "port": 9000}  # Prometheus
    ]


def test_what_is_optional_is_there_when_it_is_asked_for() -> None:
    """Pod monitors, dashboards and rules; the control store's backend."""
    plain, full = objects({}), objects(VALUES["everything"])
    more = {"PodMonitor chat-ray", "PodMonitor chat-api", "ConfigMap chat-dashboards", "ConfigMap chat-alert-rules"}
    assert set(full) - set(plain) == more
    assert full["ConfigMap chat-dashboards"]["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert full["ConfigMap chat-dashboards"]["data"] == {"cluster.json": "{}"}

    def tolerance(found: dict[str, Any]) -> Any:
        return found["RayService chat"]["spec"]["rayClusterConfig"].get("gcsFaultToleranceOptions")

    assert tolerance(plain)["backend"] == "rocksdb"
    assert tolerance(full)["redisAddress"] == "redis:6379"
    assert tolerance(objects({"faultTolerance": {"enabled": False}})) is None


@pytest.mark.parametrize("name", ["", "Chat", "1chat", "chat-", "c" * 48])
def test_a_name_that_kuberay_refuses_is_refused_here(name: str) -> None:
    """With what fits."""
    with pytest.raises(SettingsError, match="at most 47"):
        render(name, ClusterConfig(), DeploySettings())


def test_the_operator_is_told_what_objects_cannot_say() -> None:
    """That there is no key, and that a folder has to be in the pods."""
    config = parse_config("models: [{source: /checkpoints/mine}]", "test")
    said = notes(config, DeploySettings())
    assert "asks for no key" in said[0] and any("/checkpoints/mine" in line for line in said)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("worker: {gpu: 1}", "worker.gpu"),
        ("worker: {memory: 16GiB}", "worker.memory"),
        ("worker: {replicas: 4}", "several nodes are not supported yet, only 1 works"),
        ("image: {tag: 0.1.0-cpu}", "worker.gpus"),
        ("faultTolerance: {redisPasswordSecret: s}", "redisAddress"),
        ("[1]", "should hold keys"),
        ("a: [", "cannot read"),
    ],
)
def test_bad_values_are_named(text: str, complaint: str, tmp_path: Path) -> None:
    """And nothing is rendered."""
    file = tmp_path / "values.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        load_settings(file)


def test_the_command_prints_or_writes_the_objects(tmp_path: Path) -> None:
    """To standard output as one stream, or a file for each; a bad configuration ends with status 1 and its line."""
    config, values = tmp_path / "cluster.yaml", tmp_path / "values.yaml"
    config.write_text(MODELS)
    values.write_text("podMonitor: true\ncluster: {left: alone}\n")
    code, _ = ellm(
        "deploy", "render", str(config), "--name", "chat", "--values", str(values), "--out", str(tmp_path / "o")
    )
    assert code == 0
    files = sorted(path.name for path in (tmp_path / "o").iterdir())
    assert files == [
        "networkpolicy-chat.yaml",
        "poddisruptionbudget-chat-worker.yaml",
        "podmonitor-chat-api.yaml",
        "podmonitor-chat-ray.yaml",
        "rayservice-chat.yaml",
    ]
    assert yaml.safe_load((tmp_path / "o/rayservice-chat.yaml").read_text()) == objects({})["RayService chat"]
    render = ["deploy", "render", str(config), "--name", "chat", "--values", str(values), "--json"]
    printed = json.loads(CliRunner().invoke(app, render).stdout)
    assert (printed["kind"], {f"{one['kind']} {one['metadata']['name']}": one for one in printed["items"]}) == (
        "List",
        objects({"podMonitor": True}),
    )
    paths = json.loads(CliRunner().invoke(app, [*render, "--out", str(tmp_path / "o")]).stdout)
    assert sorted(paths) == sorted(str(path) for path in (tmp_path / "o").iterdir())
    config.write_text("modles: []")
    code, said = ellm("deploy", "render", str(config))
    assert code == 1 and "did you mean 'models'" in said


def test_exported_dashboards_and_rules_are_installed(tmp_path: Path) -> None:
    """By their file names, beside those of the values; too many of them, or none, is an error."""
    (tmp_path / "alerts").mkdir()
    (tmp_path / "cluster.json").write_text('{"title": "Cluster"}')
    (tmp_path / "alerts/slo.yml").write_text("groups: []")
    found = with_exported(settings({"dashboards": {"own.json": "{}"}}), tmp_path)
    assert found.dashboards == {"own.json": "{}", "cluster.json": '{"title": "Cluster"}'}
    assert found.alert_rules == {"slo.yml": "groups: []"}
    for manifest in render("chat", ClusterConfig(), found)[1:]:
        check_object(manifest)
    with pytest.raises(ConfigError, match="neither dashboards"):
        with_exported(found, tmp_path / "nowhere")
    with pytest.raises(SettingsError, match="1 MiB"):
        render("chat", ClusterConfig(), settings({"dashboards": {"a.json": "x" * (1 << 20) + "x"}}))


def test_the_ray_of_the_pods_is_the_one_that_is_tested() -> None:
    """KubeRay is told what the image has."""
    assert DeploySettings().ray_version == importlib.metadata.version("ray")


def test_the_charts_schema_is_that_of_the_values() -> None:
    """`python -m cluster.deploy.settings` prints it."""
    assert (CHART / "values.schema.json").read_text() == values_schema()
    jsonschema.Draft202012Validator.check_schema(json.loads(values_schema()))


def test_the_charts_schema_knows_a_cluster_yaml() -> None:
    """The example with every key, sizes as text or number; and neither a wrong key nor a wrong type in it."""
    schema = jsonschema.Draft202012Validator(json.loads(values_schema()))
    for text in (example_config(), MODELS, "models: [{max_model_len: auto, kv_ceiling: 1048576}]"):
        schema.validate({"cluster": yaml.safe_load(text)})
    for wrong in ("modles: []", "models: [{replica: 1}]", "memory: {budget: 1.5}", "http: {port: eighty}"):
        with pytest.raises(jsonschema.ValidationError):
            schema.validate({"cluster": yaml.safe_load(wrong)})
