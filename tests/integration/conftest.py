"""One real cluster that the integration tests share: two replicas of the default model on Ray, with agent and
controller."""

import logging
import os
import tempfile
from collections.abc import Iterator

import pytest

from cluster.config import ClusterConfig, HttpConfig, ModelConfig, SloClass
from cluster.launcher import LocalCluster
from tests.integration.watching import free_port

# Ray reads this once, when it is imported first, and the test modules import it before any cluster is started.
os.environ["RAY_AUTH_MODE"] = "token"

MAX_MODEL_LEN = 2048
CLASSES = [
    SloClass(tpot_ms=60_000.0, sheddable=False),
    SloClass(name="interactive", ttft_ms=1000.0, tpot_ms=60_000.0),
    SloClass(name="hasty", tpot_ms=60_000.0, deadline_ms=1500.0, sheddable=False),
]
"""Requests without a header are of the first. No TPOT is so tight that this machine's speed decides who enters."""


@pytest.hookimpl(tryfirst=True)  # before marks select
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the shared cluster first: those that only need some Ray then find it connected and start none of
    their own. Both are marked."""
    fixtures = {item: set(getattr(item, "fixturenames", ())) for item in items}
    for item, names in fixtures.items():
        if names & {"cluster", "local_cluster", "ray_cluster"}:
            item.add_marker("ray")
    items.sort(key=lambda item: not fixtures[item] & {"cluster", "local_cluster"})


@pytest.fixture(scope="session", autouse=True)
def vllm_sockets() -> Iterator[None]:
    """vLLM leaves the sockets of its engines behind: give engines outside the shared cluster a folder for them."""
    with tempfile.TemporaryDirectory(prefix="ellm-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_RPC_BASE_PATH", folder)
        yield


@pytest.fixture(scope="session")
def local_cluster() -> Iterator[LocalCluster]:
    """The cluster. This process is connected to its Ray, in the namespace ``ellm``."""
    # In bfloat16, the default where the CPU is fast in it, an answer depends on what is computed beside it.
    model = ModelConfig(replicas=2, dtype="float32", max_model_len=MAX_MODEL_LEN, max_num_seqs=16)
    config = ClusterConfig(models=[model], http=HttpConfig(port=free_port()), slo=CLASSES)
    log = logging.getLogger("local_cluster")
    with LocalCluster(config, lambda stage, seconds, line: log.info("%s %.1f s: %s", stage, seconds, line)) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def cluster(local_cluster: LocalCluster) -> str:
    """The base URL of the cluster's API, without /v1."""
    return local_cluster.url


@pytest.fixture(scope="session")
def model(local_cluster: LocalCluster) -> str:
    """The name that requests use for the cluster's model."""
    return local_cluster.config.models[0].name
