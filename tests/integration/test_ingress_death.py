"""An ingress that is killed while it streams: the API comes back, nothing runs on for clients that are gone, and those
that come again with their key get their answers."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.integration.replica_processes import replica_processes
from tests.integration.served_cluster import served
from tests.integration.watching import metric

DEADLINE_S = 120.0

pytestmark = pytest.mark.slow


def ingress() -> psutil.Process:
    """The process of this host that serves the API, below this process."""
    (found,) = replica_processes("ellm:api")
    return found


def running(url: str) -> int | None:
    """Requests in the engines, by their own count; None while there is no API."""
    try:
        answer = httpx.get(f"{url}/ellm/status", trust_env=False, timeout=5)
    except httpx.TransportError:
        return None
    replicas = [r for node in answer.json()["nodes"] for device in node["devices"] for r in device["replicas"]]
    return sum(replica["running"] + replica["waiting"] for replica in replicas)


def until(reached: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not reached():
        assert time.monotonic() < deadline_s, f"not within {DEADLINE_S:g} s: {what}"
        time.sleep(0.2)


def test_killed_ingress(cluster: str, model: str) -> None:
    """SIGKILL of the only ingress breaks its streams off; another one listens on the same port, and the engines have
    let go of what nobody waits for."""
    body = {"model": model, "prompt": "Hello", "max_tokens": 2000, "stream": True, "ignore_eos": True}
    victim = ingress()
    with (
        pytest.raises(httpx.TransportError),
        httpx.stream("POST", f"{cluster}/v1/completions", json=body, timeout=60, trust_env=False) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        until(lambda: running(cluster) == 1, "the stream runs")
        victim.kill()
        for _ in lines:
            pass
    until(lambda: running(cluster) is not None, "the API is back")
    assert ingress().pid != victim.pid
    until(lambda: running(cluster) == 0, "the engines have let go")
    short = body | {"max_tokens": 3, "stream": False}
    answered = httpx.post(f"{cluster}/v1/completions", json=short, timeout=60, trust_env=False)
    assert answered.json()["usage"]["completion_tokens"] == 3


ANSWER = 200
BEGINNING = 40
"""Tokens that a client has before it loses its ingress."""
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hello"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
}


def tokens_of(url: str, body: dict[str, Any], key: str, on_tokens: Callable[[int], None]) -> list[int]:
    """Of an answer, or of what came of it. on_tokens: called with their number as they stream."""
    seen: list[int] = []
    with httpx.stream("POST", url, json=body, headers={"idempotency-key": key}, timeout=60, trust_env=False) as answer:
        assert answer.status_code == 200, answer.read()
        if not body["stream"]:
            return list(json.loads(answer.read())["choices"][0]["token_ids"])
        try:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line.removeprefix("data: "))["choices"]:
                        seen += choice.get("token_ids") or []
                    on_tokens(len(seen))
        except httpx.TransportError:
            pass
    return seen


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_is_resumed_by_its_key(cluster: str, model: str, path: str, stream: bool) -> None:
    """After SIGKILL of the ingress the same request with its key gets, at a temperature above 0, the tokens that its
    client has seen and then the rest: what was computed before the death is not computed again. Asked once more it is
    the same answer, of which nothing is computed."""
    body = BODIES[path] | {"model": model, "max_tokens": ANSWER, "temperature": 1.0, "ignore_eos": True}
    body |= {"return_token_ids": True, "stream": True}
    url, key, victim = f"{cluster}{path}", f"{path} {stream}", ingress()

    def kill(tokens: int) -> None:
        if tokens >= BEGINNING and victim.is_running():
            victim.kill()

    seen = tokens_of(url, body, key, kill)
    assert BEGINNING <= len(seen) < ANSWER
    until(lambda: running(cluster) is not None, "the API is back")
    assert ingress().pid != victim.pid
    whole = tokens_of(url, body | {"stream": stream}, key, lambda tokens: None)
    assert (whole[: len(seen)], len(whole)) == (seen, ANSWER)
    not_computed = metric(cluster, "ellm_resumed_tokens_total")
    assert len(seen) <= not_computed < ANSWER
    assert tokens_of(url, body | {"stream": stream}, key, lambda tokens: None) == whole
    assert metric(cluster, "ellm_resumed_tokens_total") == not_computed + ANSWER
    assert metric(cluster, "ellm_requests_resumed_total") == 2
    other = httpx.post(url, json=body | {"top_p": 0.9}, headers={"idempotency-key": key}, timeout=60, trust_env=False)
    assert other.status_code == 422


def answering(url: str) -> psutil.Process:
    """The ingress process that has the one connection to the port of that URL."""
    port = httpx.URL(url).port
    (found,) = [
        process
        for process in replica_processes("ellm:api")
        for connection in process.net_connections("tcp")
        if connection.laddr.port == port and connection.status == psutil.CONN_ESTABLISHED
    ]
    return found


def test_another_ingress_resumes_at_once(tmp_path: Path) -> None:
    """With two ingress processes a client whose own has been killed comes again before the replica has given up what it
    runs for the dead one: its answer goes on, and it is not told that somebody else listens."""
    config = {"models": [{"name": "m", "max_model_len": 512}], "http": {"ingress_replicas": 2}}
    body = {"model": "m", "prompt": "Hello", "max_tokens": ANSWER, "temperature": 1.0, "ignore_eos": True}
    body |= {"return_token_ids": True, "stream": True}
    with served(config, tmp_path) as api:
        url, killed = f"{api}/v1/completions", []

        def kill(tokens: int) -> None:
            if tokens >= BEGINNING and not killed:
                killed.append(answering(api))
                killed[0].kill()

        seen = tokens_of(url, body, "k", kill)
        whole = tokens_of(url, body, "k", lambda tokens: None)
        assert killed
        assert (whole[: len(seen)], len(whole)) == (seen, ANSWER)
        assert len(seen) <= metric(api, "ellm_resumed_tokens_total") < ANSWER
