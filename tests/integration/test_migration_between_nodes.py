"""A streaming request moves from a replica on one node to one on another, with its KV: nodes of one host that share no
memory (``benchmarks.chaos.nodes``), the application that Ray Serve deploys, the default model in float32, greedy."""

import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
import pytest

from benchmarks.chaos.nodes import Nodes, free_port
from cluster.config import ClusterConfig, HttpConfig, MemoryConfig, ModelConfig
from cluster.models_client import command
from tests.integration import watching
from tests.integration.watching import metric

START_S, DEADLINE_S = 600.0, 180.0
PROMPT, TOKENS, BEFORE = 400, 250, 20
T = TypeVar("T")

log = logging.getLogger(__name__)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="nodes with shared memory of their own take root"),
]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    model = ModelConfig(replicas=2, dtype="float32", max_model_len=1024, max_num_seqs=8)
    config = ClusterConfig(models=[model], memory=MemoryConfig(budget=640 << 20), http=HttpConfig(port=free_port()))
    nodes = Nodes(config, workers=2)
    try:
        nodes.start()

        def serve() -> bool:
            nodes.check()
            try:
                return len(places(nodes.url)) == 2 and metric(nodes.url, "ellm_replicas_reachable") == 2
            except (httpx.HTTPError, KeyError, ValueError):
                return False

        watching.until(serve, "both replicas serve", START_S)
        yield nodes
        assert not [left for left in nodes.stop() if "-moving" in left or "-mirror" in left]
    finally:
        nodes.clear()


def places(url: str) -> dict[str, str]:
    """The node of each replica that is live."""
    status = httpx.get(f"{url}/ellm/status", trust_env=False).json()
    return {
        one["engine_id"]: node["node"]
        for node in status["nodes"]
        for device in node["devices"]
        for one in device["replicas"]
        if one["state"] == "LIVE"
    }


@dataclass
class Stream:
    """A greedy answer that comes. ``times``: of its tokens, on the monotonic clock."""

    url: str
    model: str
    prompt: list[int]
    salt: str
    name: str = ""
    text: str = ""
    times: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)

    def run(self) -> str:
        body = {"model": self.model, "prompt": self.prompt, "max_tokens": TOKENS, "stream": True, "ignore_eos": True}
        body |= {"temperature": 0.0, "cache_salt": self.salt, "stream_options": {"include_usage": True}}
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=DEADLINE_S, trust_env=False) as got:
            for line in got.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, line
                    self.name = event["id"]
                    self.text += "".join(choice["text"] for choice in event["choices"])
                    self.times += [time.monotonic()] * len(event["choices"])
                    self.usage = event.get("usage") or self.usage
        assert self.usage["completion_tokens"] == TOKENS
        return self.text


def until(reached: Callable[[], T], what: str) -> T:
    return watching.until(reached, what, DEADLINE_S)


def running(url: str) -> dict[str, int]:
    status = httpx.get(f"{url}/ellm/status", trust_env=False).json()
    devices = [device for node in status["nodes"] for device in node["devices"]]
    return {one["engine_id"]: one["running"] for device in devices for one in device["replicas"]}


def computed(url: str, replica: str) -> float:
    """Prompt tokens that a replica has computed so far: those that were neither in its prefix cache nor loaded."""
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    (info,) = [line for line in lines if line.startswith("ellm_replica_info{") and replica in line]
    found = re.search(r'engine="(\d+)"', info)
    assert found is not None
    engine = f'engine="{found[1]}"'
    cache = {
        name: metric(url, f"vllm:{name}_total", engine)
        for name in ("prefix_cache_queries", "prefix_cache_hits", "external_prefix_cache_hits")
    }
    return cache["prefix_cache_queries"] - cache["prefix_cache_hits"] - max(0.0, cache["external_prefix_cache_hits"])


def mirrors(nodes: Nodes) -> list[str]:
    return [name for node in nodes.workers for name in node.shared_files() if "-mirror-" in name]


def test_a_stream_moves_to_a_replica_on_another_node_with_its_kv(nodes: Nodes) -> None:
    """Its tokens are those of an undisturbed run, and of its context the destination computes a small part only."""
    url, where = nodes.url, places(nodes.url)
    assert len(set(where.values())) == 2, f"both replicas are on one node: {where}"
    model = httpx.get(f"{url}/v1/models", trust_env=False).json()["data"][0]["id"]
    prompt = random.Random(1).choices(range(1000, 40000), k=PROMPT)
    moved = "ellm_migrations_total", 'trigger="request"', 'outcome="moved"'
    undisturbed = Stream(url, model, prompt, "undisturbed").run()
    with ThreadPoolExecutor(1) as pool:
        stream = Stream(url, model, prompt, "moves")
        before = {replica: computed(url, replica) for replica in where}
        answer: Future[str] = pool.submit(stream.run)
        until(lambda: len(stream.times) >= BEFORE, "it has tokens")
        source = until(lambda: [one for one, count in running(url).items() if count], "it is known where it runs")[0]
        (destination,) = set(where) - {source}
        began = max(0.0, metric(url, *moved))
        found = command(url, "POST", "/ellm/migrate", {"request_id": stream.name, "to": destination})
        assert not answer.done(), "it moved while it streamed"
        assert (found["source"], found["destination"]) == (source, destination)
        assert found["blocks_ahead"] > 0
        at_switch = len(stream.times)
        assert answer.result() == undisturbed
    assert metric(url, *moved) == began + 1
    assert max(0.0, metric(url, "ellm_requests_continued_total")) == 0
    time.sleep(2.0)  # the engines' counts come once a second
    there = computed(url, destination) - before[destination]
    log.info("%s; %d prompt tokens computed there, of a context of %d", found, there, PROMPT + at_switch)
    assert there < (PROMPT + at_switch) / 4
    until(lambda: not mirrors(nodes), "nothing is left of it")
