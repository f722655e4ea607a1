"""An ingress that is killed while it streams: the API comes back, and nothing runs on for clients that are gone."""

import time
from collections.abc import Callable

import httpx
import psutil
import pytest

from tests.integration.replica_processes import replica_processes

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
