"""A replica of a real cluster that is drained while it streams. Every answer is the one of an undisturbed run."""

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import httpx
import pytest

from cluster.models_client import command
from tests.integration import watching
from tests.integration.watching import metric

PROMPTS = ["One day a fox", "The capital of", "In a small town", "Water is made of"]
DEADLINE_S = 180.0
T = TypeVar("T")

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


def until(reached: Callable[[], T], what: str) -> T:
    return watching.until(reached, what, DEADLINE_S)


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
