"""The running cluster under memory pressure, and without its agent and controller: what clients notice is nothing."""

import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import ray

from memory_agent.agent import agent_name
from memory_agent.controller_link import NAMESPACE

DEADLINE_S = 60.0


def status(url: str) -> dict[str, Any]:
    """The controller's snapshot; empty while it is away."""
    answer = httpx.get(f"{url}/ellm/status", timeout=20, trust_env=False)
    return dict(answer.json()) if answer.status_code == 200 else {}


def device(url: str) -> dict[str, Any]:
    nodes = status(url).get("nodes") or [{"devices": [{"replicas": [], "agent_pid": None}]}]
    return dict(nodes[0]["devices"][0])


def replicas(url: str) -> dict[str, dict[str, Any]]:
    return {replica["engine_id"]: replica for replica in device(url)["replicas"]}


def requests_of(url: str, engine_id: str) -> int:
    replica = replicas(url)[engine_id]
    return int(replica["running"] + replica["waiting"])


def until(reached: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not reached():
        assert time.monotonic() < deadline_s, f"not within {DEADLINE_S:g} s: {what}"
        time.sleep(0.1)


def stream(url: str, model: str, prompt: list[int], tokens: int) -> int:
    """Tokens that one streamed completion delivered, from its own usage figures. Raises on an error in the stream."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    used = 0
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120, trust_env=False) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                used = (event.get("usage") or {}).get("completion_tokens", used)
    return used


def prompt_of(seed: int, tokens: int) -> list[int]:
    return [1000 + (seed * 7919 + i * 31) % 30000 for i in range(tokens)]


@pytest.mark.slow
def test_new_requests_avoid_a_replica_under_pressure(cluster: str, model: str) -> None:
    """While one replica cannot hold what its requests want, every new request goes to the other one."""
    until(lambda: len(replicas(cluster)) == 2, "two replicas report")
    victim, other = sorted(replicas(cluster))
    guarantee, ceiling = (replicas(cluster)[victim][key] for key in ("guarantee_bytes", "ceiling_bytes"))
    node_id = status(cluster)["nodes"][0]["node"]
    agent: Any = ray.get_actor(agent_name(node_id, device(cluster)["device"]), namespace=NAMESPACE)
    ray.get(agent.set_limits.remote(victim, guarantee, guarantee))
    try:
        with ThreadPoolExecutor(20) as pool:
            load = [pool.submit(stream, cluster, model, prompt_of(i, 900), 150) for i in range(8)]
            until(lambda: replicas(cluster)[victim]["pressure"] == "CRITICAL", "the victim is under heavy pressure")
            until(lambda: sum(requests_of(cluster, one) for one in (victim, other)) == len(load), "all have arrived")
            assert replicas(cluster)[other]["pressure"] != "CRITICAL"
            before_victim, before_other = requests_of(cluster, victim), requests_of(cluster, other)
            more = [pool.submit(stream, cluster, model, prompt_of(100 + i, 20), 40) for i in range(5)]
            until(lambda: requests_of(cluster, other) >= before_other + len(more), "new requests reach the other one")
            assert requests_of(cluster, victim) <= before_victim
            assert [answer.result() for answer in more] == [40] * len(more)
            assert [answer.result() for answer in load] == [150] * len(load)
    finally:
        ray.get(agent.set_limits.remote(victim, guarantee, ceiling))
        until(lambda: replicas(cluster)[victim]["ceiling_bytes"] == ceiling, "the reports show the old ceiling again")


def test_streams_outlive_agent_and_controller(cluster: str, model: str) -> None:
    """SIGKILL of the agent and of the controller while tokens stream: no stream ends, both come back as new processes,
    and their view is the one from before."""
    until(lambda: len(replicas(cluster)) == 2, "two replicas report")
    known = replicas(cluster)
    agent_pid, controller_pid = device(cluster)["agent_pid"], status(cluster)["controller_pid"]
    with ThreadPoolExecutor(4) as pool:
        streams: list[Future[int]] = [pool.submit(stream, cluster, model, prompt_of(i, 60), 250) for i in range(4)]
        until(lambda: sum(r["running"] for r in replicas(cluster).values()) == 4, "all four streams run")
        os.kill(agent_pid, signal.SIGKILL)
        os.kill(controller_pid, signal.SIGKILL)
        assert stream(cluster, model, prompt_of(50, 20), 5) == 5, "a new request during the outage"
        assert [answer.result() for answer in streams] == [250] * 4
    until(lambda: device(cluster)["agent_pid"] not in (None, agent_pid), "the agent is back")
    until(lambda: status(cluster).get("controller_pid") not in (None, controller_pid), "the controller is back")
    until(lambda: replicas(cluster).keys() == known.keys(), "both replicas are known again")
    for engine_id, replica in replicas(cluster).items():
        for key in ("pid", "guarantee_bytes", "ceiling_bytes", "weights_bytes"):
            assert replica[key] == known[engine_id][key]
        assert replica["lease_revision"] >= known[engine_id]["lease_revision"]
        assert replica["target_revision"] >= known[engine_id]["target_revision"]


@pytest.mark.slow
def test_targets_hold_without_their_controller(cluster: str, model: str) -> None:
    """Replicas that run requests get targets from what they measured. With the controller killed they keep them and
    answer on; the next one goes on from these, under higher revisions, and tells why."""

    def sized() -> dict[str, dict[str, Any]]:
        return {name: one for name, one in replicas(cluster).items() if one["token_budget_max"] and one["step_s"]}

    with ThreadPoolExecutor(8) as pool:
        load = [pool.submit(stream, cluster, model, prompt_of(200 + i, 300), 120) for i in range(8)]
        until(lambda: len(sized()) == 2, "both replicas have a target of their own")
        assert [answer.result() for answer in load] == [120] * len(load)
        controller_pid, before = status(cluster)["controller_pid"], sized()
        more = [pool.submit(stream, cluster, model, prompt_of(300 + i, 300), 120) for i in range(4)]
        os.kill(controller_pid, signal.SIGKILL)
        assert [answer.result() for answer in more] == [120] * len(more)
    until(lambda: status(cluster).get("controller_pid") not in (None, controller_pid), "the controller is back")
    until(
        lambda: (
            sized().keys() == before.keys()
            and all(one["target_revision"] > before[name]["target_revision"] for name, one in sized().items())
        ),
        "both replicas have a target of the new controller",
    )
    answer = httpx.get(f"{cluster}/ellm/decisions", params={"last": "100"}, timeout=20, trust_env=False)
    told = {one["subject"]: one for one in answer.json() if one["kind"] == "target"}
    assert told.keys() >= before.keys()
    assert all(told[name]["reason"] and told[name]["inputs"]["tpot_target_ms"] > 0 for name in before)
