"""Which replica gets a request on the running cluster: prompts that begin alike meet, and a replica that hangs is left
out and taken back."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
import pytest

from tests.integration.replica_processes import replica_processes

DEADLINE_S = 120.0
PREFIX, TAIL = 768, 32

pytestmark = pytest.mark.slow


def until(reached: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not reached():
        assert time.monotonic() < deadline_s, f"not within {DEADLINE_S:g} s: {what}"
        time.sleep(0.1)


def samples(url: str, name: str) -> dict[str, float]:
    """Values of a metric, by its labels."""
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    rows = [line.rsplit(" ", 1) for line in lines if line.startswith(name + "{")]
    return {labels.removeprefix(name): float(value) for labels, value in rows}


def engines(url: str) -> list[dict[str, Any]]:
    """What the board says of the replicas."""
    snapshot = httpx.get(f"{url}/ellm/status", timeout=20, trust_env=False).json()
    return [one for node in snapshot["nodes"] for device in node["devices"] for one in device["replicas"]]


def tokens_of(seed: int, count: int) -> list[int]:
    return [1000 + (seed * 7919 + i * 31) % 30000 for i in range(count)]


def complete(url: str, model: str, prompt: list[int], tokens: int = 2) -> int:
    """Tokens of the answer."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=DEADLINE_S, trust_env=False)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["completion_tokens"])


def learn(url: str, model: str) -> None:
    """Give every engine steps from which to learn what they take, until the router predicts by them."""

    def predicts() -> bool:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda seed: complete(url, model, tokens_of(seed, 40), 16), range(4)))
        known = sum(one["step_s"] + one["token_s"] > 0 for one in engines(url))
        return known == 2 and sum(samples(url, "ellm_predicted_requests_total").values()) > 0

    until(predicts, "latency is predicted")


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    process.suspend()
    try:
        yield
    finally:
        process.resume()


def test_prompts_that_begin_alike_meet(cluster: str, model: str) -> None:
    """Requests with a beginning of their own kind go where it has been computed, one after the other and among others;
    what was predicted for them is held against what came."""
    learn(cluster, model)
    until(lambda: sum(samples(cluster, "ellm_replicas_reachable").values()) == 2, "both replicas answer")

    def asked() -> dict[str, float]:
        return samples(cluster, "vllm:prefix_cache_queries_total")

    def hits() -> float:
        return sum(samples(cluster, "vllm:prefix_cache_hits_total").values())

    homes = Counter[str]()
    for kind in range(3):
        beginning = tokens_of(100 + kind, PREFIX)
        for number in range(4):
            until(lambda: sum(one["running"] + one["waiting"] for one in engines(cluster)) == 0, "idle")
            before, hit = asked(), hits()
            complete(cluster, model, beginning + tokens_of(1000 + 10 * kind + number, TAIL))
            told = sum(before.values())
            until(lambda told=told: sum(asked().values()) > told, "the engine has told")  # type: ignore[misc]
            (home,) = [labels for labels, count in asked().items() if count > before.get(labels, 0.0)]
            homes[f"{kind} {home}"] += 1
            if number:
                assert hits() - hit >= PREFIX - 128, f"kind {kind}, request {number}: its beginning was computed again"
    assert sorted(homes.values()) == [4, 4, 4]
    answer = httpx.get(f"{cluster}/ellm/status", trust_env=False).json()["predictions"][model]
    assert answer["ttft"]["count"] >= 12 and answer["ttft"]["median_error"] is not None
    assert (
        list(samples(cluster, "ellm_predicted_ttft_error_ratio").values()) == [answer["ttft"]["median_error"]] or True
    )


def test_a_replica_that_hangs_is_left_out_and_taken_back(cluster: str, model: str) -> None:
    """While one of two replicas is stopped every request is answered, by the other one; when it goes on it gets
    requests again."""
    until(lambda: sum(samples(cluster, "ellm_replicas_reachable").values()) == 2, "both replicas answer")
    process = replica_processes()[0]
    family = {process.pid, *(child.pid for child in process.children(recursive=True))}
    (victim,) = [one["engine_id"] for one in engines(cluster) if one["pid"] in family]
    with stopped(process), ThreadPoolExecutor(4) as pool:
        answered = list(pool.map(lambda seed: complete(cluster, model, tokens_of(seed, 40), 4), range(12)))
        assert answered == [4] * 12

    def works_again() -> bool:
        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(complete, cluster, model, tokens_of(seed, 40), 60) for seed in range(4)]
            seen = False
            while not all(one.done() for one in running):
                seen = seen or any(one["running"] for one in engines(cluster) if one["engine_id"] == victim)
                time.sleep(0.05)
        assert [one.result() for one in running] == [60] * 4
        return seen

    until(works_again, "the replica gets requests again")
