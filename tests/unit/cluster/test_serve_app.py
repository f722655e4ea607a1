"""The cluster as a Serve application: what its builder takes and makes, and when the cluster is started with it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.serve._private.build_app import build_app

import cluster.serve_app
from cluster.config import ClusterConfig, HttpConfig
from cluster.config_file import ConfigError, parse_config
from cluster.model_registry import RegistrySpec
from cluster.serve_app import ClusterControl, build, check_app_name, check_unchanged, cluster_id_of
from memory_agent.errors import SettingsError

Started = list[ClusterConfig]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Ray, Serve and the stages of a start: ``registry`` is the configuration of one that runs, or None."""
    world = SimpleNamespace(registry=None, started=[], deleted=[], applications={}, file=tmp_path / "models.json")

    def registry_actor() -> Any:
        if world.registry is None:
            raise ValueError("no such actor")
        return SimpleNamespace(configuration=SimpleNamespace(remote=lambda: world.registry))

    def start_control(config: ClusterConfig, *rest: object) -> None:
        world.started.append(config)
        world.registry = config

    module = cluster.serve_app
    monkeypatch.setattr(RegistrySpec, "path", world.file)
    monkeypatch.setattr(module, "registry_actor", registry_actor)
    monkeypatch.setattr(module, "start_control", start_control)
    for stage in ("read_models", "size_cluster", "check_engines"):
        monkeypatch.setattr(module, stage, lambda *given: None)
    monkeypatch.setattr(
        module,
        "ray",
        SimpleNamespace(
            get=lambda answer, timeout: answer,
            get_runtime_context=lambda: SimpleNamespace(get_session_name=lambda: "session"),
        ),
    )
    monkeypatch.setattr(
        module,
        "serve",
        SimpleNamespace(
            get_replica_context=lambda: SimpleNamespace(app_name="ellm"),
            status=lambda: SimpleNamespace(applications=world.applications),
            delete=world.deleted.append,
        ),
    )
    return world


def test_the_builder_makes_the_api_and_what_starts_the_rest() -> None:
    """Two deployments, from the tree that a cluster.yaml holds."""
    app = build({"models": [{"source": "default", "replicas": 1}], "http": {"ingress_replicas": 2}})
    assert isinstance(app, serve.Application)
    built = build_app(app, name="ellm")
    assert {one.name: one.num_replicas for one in built.deployments} == {"control": 1, "api": 2}
    assert built.ingress_deployment_name == "api"


def test_a_bad_configuration_is_named_with_its_place() -> None:
    """As `ellm serve` names it."""
    with pytest.raises(ConfigError, match=r"models\[0\]\.replica: unknown key; did you mean 'replicas'"):
        build({"models": [{"replica": 1}]})


def test_the_first_control_starts_the_cluster_and_the_next_one_goes_on(played: Any) -> None:
    """Where the registry runs nothing is sized or started: its models have taken the memory."""
    config = ClusterConfig()
    first = ClusterControl(config)
    first.check_health()
    ClusterControl(config).check_health()
    assert played.started == [config]


def test_a_control_without_a_registry_is_replaced_and_starts_anew(played: Any) -> None:
    """The models that the lost one had started are ended first, and its file is forgotten; other applications stay."""
    control = ClusterControl(ClusterConfig())
    played.registry = None
    with pytest.raises(ValueError, match="no such actor"):
        control.check_health()
    played.applications = {"ellm": None, "ellm-model:a": None, "somebody's": None}
    played.file.write_text("the lost one's models")
    ClusterControl(ClusterConfig())
    assert played.deleted == ["ellm-model:a"] and not played.file.exists() and len(played.started) == 2


def test_another_configuration_on_the_same_ray_is_refused(played: Any) -> None:
    """With the sections that differ, and what would work; the running cluster is left alone."""
    ClusterControl(ClusterConfig())
    with pytest.raises(SettingsError, match=r"differs in: http\. .*ellm models add.*new Ray cluster"):
        ClusterControl(ClusterConfig(http=HttpConfig(port=9000)))
    assert len(played.started) == 1
    check_unchanged(parse_config("http: {port: 8000}", "a"), ClusterConfig())


def test_the_application_has_its_name(played: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry and the status look for the API under it."""
    with pytest.raises(SettingsError, match="'default'; it has to be named 'ellm'"):
        check_app_name("default")
    monkeypatch.setattr(cluster.serve_app.serve, "get_replica_context", lambda: SimpleNamespace(app_name="default"))
    with pytest.raises(SettingsError):
        ClusterControl(ClusterConfig())
    assert played.started == []


def test_the_cluster_id_is_that_of_the_ray_cluster() -> None:
    """The same for every control of it, another one for another Ray; fit for a file's name."""
    assert cluster_id_of("a") == cluster_id_of("a") != cluster_id_of("b")
    RegistrySpec(cluster_id_of("a"), "cpu", ClusterConfig())
    assert cluster_id_of("a").isalnum()
