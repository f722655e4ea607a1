"""Replicas of a real cluster that are emptied while they stream: by a drain, and because Ray Serve ends them. Every
answer is the one of an undisturbed run."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from cluster.config import ModelConfig
from cluster.models_client import ModelsClient, command

PROMPTS = ["One day a fox", "The capital of", "In a small town", "Water is made of"]
DEADLINE_S = 180.0

pytestmark = pytest.mark.slow


def stream(url: str, model: str, prompt: str, tokens: int) -> str:
    """The text of a streamed answer, which has to come whole."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True}
    body |= {"temperature": 0.0, "stream_options": {"include_usage": True}}
    text, usage = "", {}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=DEADLINE_S, trust_env=False) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, line
                text += "".join(choice["text"] for choice in event["choices"])
                usage = event.get("usage") or usage
    assert usage["completion_tokens"] == tokens
    return text


def until(reached: Callable[[], Any], what: str) -> Any:
    deadline_s = time.monotonic() + DEADLINE_S
    while not (found := reached()):
        assert time.monotonic() < deadline_s, f"not within {DEADLINE_S:g} s: {what}"
        time.sleep(0.1)
    return found


def metric(url: str, name: str, *labels: str) -> float:
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    found = [line for line in lines if line.startswith(name + "{") and all(label in line for label in labels)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in found)


def running(url: str, model: str) -> dict[str, int]:
    """Requests of each of the model's replicas."""
    (node,) = httpx.get(f"{url}/ellm/status", trust_env=False).json()["nodes"]
    replicas = node["devices"][0]["replicas"]
    return {one["engine_id"]: one["running"] + one["waiting"] for one in replicas if one["model"] == model}


def start(pool: ThreadPoolExecutor, url: str, model: str, tokens: int) -> "list[Future[str]]":
    return [pool.submit(stream, url, model, prompt, tokens) for prompt in PROMPTS]


def test_a_replica_is_drained_while_it_streams(cluster: str, model: str) -> None:
    """What it has moves, what comes meanwhile goes elsewhere, and afterwards it may have requests again."""
    tokens = 200
    moved = 'trigger="drain"', 'outcome="moved"'
    until(lambda: metric(cluster, "ellm_replicas_reachable", f'"{model}"') == 2, "both replicas answer")
    continued = metric(cluster, "ellm_requests_continued_total")
    with ThreadPoolExecutor(8) as pool:
        undisturbed = [one.result() for one in start(pool, cluster, model, tokens)]
        streams = start(pool, cluster, model, tokens)
        busy = until(lambda: [one for one, count in running(cluster, model).items() if count >= 2], "two on one")[0]
        command(cluster, "POST", "/ellm/drain", {"target": busy})
        until(lambda: metric(cluster, "ellm_migrations_total", *moved) >= 2, "its requests have moved")
        assert not all(one.done() for one in streams), "they moved while they streamed"
        (drain,) = until(lambda: command(cluster, "GET", "/ellm/drains")["drains"], "it says that it drains")
        assert (drain["replica"], drain["model"]) == (busy, model)
        until(lambda: not command(cluster, "GET", "/ellm/drains")["drains"][0]["streams"], "it is empty")
        more = start(pool, cluster, model, 8)
        assert [one.result() for one in streams] == undisturbed
        assert [one.result() for one in more] == [stream(cluster, model, prompt, 8) for prompt in PROMPTS]
    assert running(cluster, model)[busy] == 0
    assert metric(cluster, "ellm_requests_continued_total") == continued
    assert metric(cluster, "ellm_migration_downtimes_total") >= 2
    command(cluster, "POST", "/ellm/drain", {"target": busy, "undo": True})
    until(lambda: not command(cluster, "GET", "/ellm/drains")["drains"], "it drains no more")


@pytest.fixture
def scaling(cluster: str) -> Iterator[str]:
    """A model of one replica, and of two while there is much to do."""
    model = ModelConfig.model_validate(
        {
            "name": "scaling",
            "replicas": 1,
            "max_model_len": 1024,
            "max_num_seqs": 16,
            "autoscaling_config": {"min_replicas": 1, "max_replicas": 2, "downscale_delay_s": 10.0},
        }
    )
    client = ModelsClient(cluster)
    client.add(model)
    try:
        until(lambda: metric(cluster, "ellm_replicas_reachable", '"scaling"') == 1, "a replica answers")
        yield "scaling"
    finally:
        client.remove("scaling")
        until(lambda: "scaling" not in [one["name"] for one in client.models()], "the model is gone")


def test_a_replica_that_ray_serve_ends_is_emptied(cluster: str, scaling: str) -> None:
    """Its streams move to the one that stays, instead of keeping it for as long as they last."""
    tokens, enough = 600, threading.Event()
    moved = '"scaling"', 'trigger="stop"', 'outcome="moved"'

    def prompts(number: int) -> None:
        while not enough.is_set():
            number += 8
            stream(cluster, scaling, f"{number} " * 350, 2)

    with ThreadPoolExecutor(16) as pool:
        burst = [pool.submit(prompts, number) for number in range(8)]
        try:
            until(lambda: metric(cluster, "ellm_replicas_reachable", '"scaling"') == 2, "a second replica answers")
        finally:
            enough.set()
        for one in burst:
            one.result()
        streams = start(pool, cluster, scaling, tokens)
        until(lambda: sorted(running(cluster, scaling).values()) == [2, 2], "they are at both")
        until(lambda: metric(cluster, "ellm_replicas_reachable", '"scaling"') == 1, "one replica is enough")
        until(lambda: metric(cluster, "ellm_migrations_total", *moved) >= 1, "a request has moved")
        assert not all(one.done() for one in streams), "it moved while it streamed"
        answers = [one.result() for one in streams]
        assert answers == [one.result() for one in start(pool, cluster, scaling, tokens)]
    assert metric(cluster, "ellm_requests_continued_total", '"scaling"') == 0
