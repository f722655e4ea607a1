"""A replica that runs out of KV memory beside one with room: requests leave it with their KV, tokens streaming on."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import ray

from memory_agent.agent import agent_name
from memory_agent.controller_link import NAMESPACE
from tests.integration.watching import metric, until

STREAMS, PROMPT, TOKENS = 6, 400, 500
WITHIN_S = 90.0


def replicas(url: str) -> dict[str, dict[str, Any]]:
    nodes = httpx.get(f"{url}/ellm/status", timeout=20, trust_env=False).json()["nodes"]
    return {one["engine_id"]: one | {"node": nodes[0]["node"]} for one in nodes[0]["devices"][0]["replicas"]}


def answer(url: str, model: str, seed: int) -> list[int]:
    """The token ids of a greedy answer."""
    prompt = [1000 + (seed * 7919 + i * 31) % 30000 for i in range(PROMPT)]
    body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    told = httpx.post(f"{url}/v1/completions", json=body | {"return_token_ids": True}, timeout=300, trust_env=False)
    told.raise_for_status()
    return list(told.json()["choices"][0]["token_ids"])


@pytest.mark.slow
def test_requests_leave_a_replica_that_runs_out_of_memory(cluster: str, model: str) -> None:
    until(lambda: len(replicas(cluster)) == 2, "two replicas report", WITHIN_S)
    with ThreadPoolExecutor(STREAMS) as pool:
        wanted = list(pool.map(lambda seed: answer(cluster, model, seed), range(STREAMS)))
    moved = ("ellm_migrations_total", 'outcome="moved"')
    before = max(0, metric(cluster, *moved))
    with ThreadPoolExecutor(STREAMS) as pool:
        again = [pool.submit(answer, cluster, model, seed) for seed in range(STREAMS)]
        until(lambda: sum(one["running"] for one in replicas(cluster).values()) == STREAMS, "all run", WITHIN_S)
        victim, state = max(replicas(cluster).items(), key=lambda item: item[1]["running"])
        assert state["running"] >= STREAMS // 2
        agent: Any = ray.get_actor(agent_name(state["node"], "cpu"), namespace=NAMESPACE)
        tight = state["used_bytes"]  # the next block of any of its requests is one too many
        ray.get(agent.set_limits.remote(victim, min(state["guarantee_bytes"], tight), tight))
        try:
            until(lambda: metric(cluster, *moved) > before, "a request has left", WITHIN_S)
        finally:
            ray.get(agent.set_limits.remote(victim, state["guarantee_bytes"], state["ceiling_bytes"]))
        assert [one.result() for one in again] == wanted
    decisions = httpx.get(f"{cluster}/ellm/decisions", params={"last": "100"}, timeout=20, trust_env=False).json()
    told = [one for one in decisions if one["kind"] == "move" and one["subject"] == victim]
    assert told and "KV tokens wanted soon" in told[-1]["reason"]
