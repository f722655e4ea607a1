"""A model whose replicas come and go with its demand, with made-up answers at a given pace: up under load, down while
streams run on, to none, and back for the next request."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from cluster.config import ModelConfig
from cluster.models_client import ModelsClient
from tests.integration import watching
from tests.integration.watching import metric

DEADLINE_S = 180.0
PACE, RUNNING, STREAMS = 25.0, 8, 3
"""So many streams that either replica has one, and so few that one replica is enough for them."""

pytestmark = pytest.mark.slow


def until(reached: Callable[[], bool], what: str) -> None:
    watching.until(reached, what, DEADLINE_S)


def phase(url: str, name: str) -> str:
    return next((model["phase"] for model in ModelsClient(url).models() if model["name"] == name), "gone")


def replicas(url: str, name: str) -> int:
    """That answer."""
    return int(metric(url, "ellm_replicas_reachable", f'model_name="{name}"'))


def asked_to_leave(url: str, name: str) -> float:
    """Requests that were to leave a replica because Ray Serve ends it. A paced engine keeps them: it has no KV."""
    return metric(url, "ellm_migrations_total", f'model_name="{name}"', 'trigger="stop"')


def complete(url: str, name: str, tokens: int) -> int:
    """Tokens of a streamed answer."""
    body = {"model": name, "prompt": [5, 6, 7], "max_tokens": tokens, "stream": True, "ignore_eos": True}
    got = 0
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=DEADLINE_S, trust_env=False) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            assert '"error"' not in line, line
            got += line.startswith("data: {")
    return got


@pytest.fixture(scope="module")
def name(cluster: str) -> Iterator[str]:
    """A model that may have no replica and at most two, beside the cluster's own."""
    model = ModelConfig.model_validate(
        {
            "name": "paced",
            "replicas": 1,
            "elastic": False,
            "paced_tokens_per_s": PACE,
            "max_model_len": 4096,
            "max_num_seqs": RUNNING,
            "autoscaling_config": {"min_replicas": 0, "max_replicas": 2, "downscale_delay_s": 4.0},
        }
    )
    client = ModelsClient(cluster)
    client.add(model)
    until(lambda: phase(cluster, "paced") == "serving", "the model serves")
    yield "paced"
    client.remove("paced")
    until(lambda: phase(cluster, "paced") == "gone", "the model is gone")


def test_up_under_load_and_down_without_breaking_a_stream(cluster: str, name: str) -> None:
    """More requests than a replica runs bring a second one; when most have ended one of both goes, and the answers that
    it was giving arrive whole."""
    long = int(PACE * 90)
    with ThreadPoolExecutor(3 * RUNNING + STREAMS) as pool:
        burst = [pool.submit(complete, cluster, name, int(PACE * 20)) for _ in range(3 * RUNNING)]
        until(lambda: replicas(cluster, name) == 2, "a second replica")
        streams = [pool.submit(complete, cluster, name, long) for _ in range(STREAMS)]
        assert [one.result() for one in burst] == [int(PACE * 20)] * len(burst)
        until(lambda: replicas(cluster, name) == 1 or all(one.done() for one in streams), "one replica is enough")
        assert not any(one.done() for one in streams), "the streams outlive the decision"
        until(lambda: asked_to_leave(cluster, name) >= 1, "the stream of the one that ends is asked to leave")
        assert [one.result() for one in streams] == [long] * len(streams)


def test_to_none_and_back(cluster: str, name: str) -> None:
    """Nobody asks: no replica is left, and the cluster is healthy. The next request waits for one, and is answered."""
    until(lambda: replicas(cluster, name) == 0, "no replica is left")
    assert httpx.get(f"{cluster}/health", trust_env=False).status_code == 200
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda _: complete(cluster, name, 5), range(3))) == [5] * 3
    assert replicas(cluster, name) == 1
