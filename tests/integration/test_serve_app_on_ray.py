"""From an LLMConfig of ray.serve.llm to a configuration, to what KubeRay deploys, on a Ray that `serve run` alone has
started: it answers, and goes on when Serve's controller and what started the cluster die."""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import ClusterConfig
from cluster.config_file import validated
from cluster.default_model import get_default_model
from cluster.deploy.ray_service import ray_service
from cluster.deploy.settings import DeploySettings
from cluster.footprint import remove_leftovers
from cluster.from_ray_llm import read_ray_llm
from cluster.models_client import ModelsClient
from cluster.readiness import NoAnswer, answer_once, read_status
from cluster.serve_app import cluster_id_of
from cluster.start_stages import PROCESS_ENVIRONMENT
from memory_agent.processes import SHM
from tests.integration.watching import free_port

START_S, AGAIN_S = 600.0, 240.0
ROOT = Path(__file__).parents[2]
LLM_CONFIG = """
model_loading_config: {{model_id: small, model_source: {source}}}
engine_kwargs: {{max_model_len: 2048, max_num_seqs: 16}}
deployment_config: {{num_replicas: 1}}
accelerator_config: {{kind: cpu}}
"""
PIDS = """
import sys, ray
from ray.util.state import list_actors
ray.init(address=sys.argv[1], namespace="serve", log_to_driver=False)
alive = list_actors(filters=[("state", "=", "ALIVE")], detail=True, limit=1000)
print(*([a.pid for a in alive if a.class_name == name] for name in sys.argv[2:]), sep=";")
"""
"""Prints the processes of the actors of each class that is named."""

pytestmark = pytest.mark.slow


class ServedByRay:
    """What `serve run` has started."""

    def __init__(self, config: ClusterConfig) -> None:
        self.url = f"http://127.0.0.1:{config.http.port}"
        folder = self.folder = Path(tempfile.gettempdir()) / f"ellm-{secrets.token_hex(4)}"
        folder.mkdir(mode=0o700)
        manifest = ray_service("chat", config, DeploySettings())
        (folder / "serve.yaml").write_text(manifest["spec"]["serveConfigV2"])
        tokens = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        places = {"RAY_TMPDIR": str(folder), "VLLM_RPC_BASE_PATH": str(folder), "PYTHONPATH": str(ROOT)}
        self.environment = {**os.environ, **PROCESS_ENVIRONMENT, **tokens, **places}
        self.environment.pop("RAY_ADDRESS", None)
        serve = str(Path(sys.executable).with_name("serve"))
        command = [serve, "run", "--address", "local", str(folder / "serve.yaml")]
        self.log = (folder / "serve.log").open("w")
        self.process = subprocess.Popen(command, env=self.environment, stdout=self.log, stderr=self.log, cwd=folder)
        (folder / "owner.pid").write_text(str(self.process.pid))  # as `remove_leftovers` wants it

    @property
    def log_text(self) -> str:
        return Path(self.log.name).read_text()[-8000:]

    def pids(self, *names: str) -> dict[str, list[int]]:
        address = next(self.folder.rglob("ray_current_cluster")).read_text().strip()
        command = [sys.executable, "-c", PIDS, address, *names]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120, check=True)
        found = [yaml.safe_load(part) for part in done.stdout.strip().splitlines()[-1].split(";")]
        return dict(zip(names, found, strict=True))

    def stop(self) -> None:
        sessions = {path.name for path in self.folder.rglob("session_2*") if path.is_dir()}
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()
        remove_leftovers()
        for session in sessions:
            for path in SHM.glob(f"ellm-{cluster_id_of(session)}-*"):
                path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedByRay]:
    """A cluster of one small real model."""
    file = tmp_path_factory.mktemp("ray-llm") / "llm.yaml"
    file.write_text(LLM_CONFIG.format(source=get_default_model(lambda line: None)))
    tree = read_ray_llm(file).tree
    tree["http"] = {"port": free_port()}
    one = ServedByRay(validated(tree, str(file)))
    try:
        yield one
    finally:
        one.stop()


def until(done: Callable[[], Any], seconds: float, served: ServedByRay, what: str) -> Any:
    deadline_s = time.monotonic() + seconds
    while not (found := done()):
        assert served.process.poll() is None, f"serve run has ended:\n{served.log_text}"
        assert time.monotonic() < deadline_s, f"not within {seconds:g} s: {what}\n{served.log_text}"
        time.sleep(0.5)
    return found


def answers(served: ServedByRay) -> str:
    try:
        return answer_once(served.url, "small")
    except NoAnswer:
        return ""


def test_the_rendered_configuration_serves(served: ServedByRay) -> None:
    """Its model answers through the API, and its memory is elastic."""
    assert "Paris" in until(lambda: answers(served), START_S, served, "an answer")
    (model,) = ModelsClient(served.url).models()
    assert model["phase"] == "serving" and model["elastic"] and model["limit_bytes"] > 0
    assert read_status(served.url)["controller_pid"]


def test_the_cluster_outlives_who_started_it(served: ServedByRay) -> None:
    """Serve's controller and the control deployment are killed: both are made again, the cluster's own actors are the
    same processes still, and requests are answered."""
    until(lambda: answers(served), START_S, served, "an answer")
    starters = ("ServeController", "ServeReplica:ellm:control")
    actors = ("ModelRegistry", "Controller", "MemoryAgent")
    before = served.pids(*starters, *actors)
    for name in starters:
        (pid,) = before[name]
        os.kill(pid, signal.SIGKILL)

    def again() -> bool:
        now = served.pids(*starters, *actors)
        assert all(now[name] == before[name] for name in actors)
        return all(len(now[name]) == 1 and now[name] != before[name] for name in starters)

    until(again, AGAIN_S, served, "a new Serve controller and a new control, beside the same actors")
    assert until(lambda: answers(served), AGAIN_S, served, "an answer afterwards")
    assert [model["phase"] for model in ModelsClient(served.url).models()] == ["serving"]
