"""SLO classes at the door of a real cluster: headers, deadlines, overload, counts. The model is a paced one, so that
what is full and what is late follows from its pace and not from this machine's."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

NAME = "paced"
PLACES = 4
TOKENS_PER_S = 20
DEADLINE_S = 30.0

pytestmark = pytest.mark.slow


def ellm(url: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "cluster.cli", "models", *arguments, "--url", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def http(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of the cluster, to which a paced model of two replicas with two places each has been added."""
    file: Path = tmp_path_factory.mktemp("paced") / "models.yaml"
    file.write_text(
        f"models: [{{name: {NAME}, replicas: 2, elastic: false, max_model_len: 512, max_num_seqs: {PLACES // 2}, "
        f"paced_tokens_per_s: {TOKENS_PER_S}}}]"
    )
    ellm(cluster, "add", "--config", str(file), "--name", NAME)
    with httpx.Client(base_url=cluster, timeout=120, trust_env=False) as client:
        yield client
    ellm(cluster, "remove", NAME)


def ask(http: httpx.Client, tokens: int, slo_class: str, **more: Any) -> httpx.Response:
    body = {"model": NAME, "prompt": "Hello", "max_tokens": tokens, "ignore_eos": True} | more
    return http.post("/v1/completions", json=body, headers={"x-slo-class": slo_class})


def counts(http: httpx.Client, slo_class: str) -> dict[str, Any]:
    classes: dict[str, Any] = http.get("/ellm/status").json()["slo"]["classes"]
    return classes.get(slo_class, {})


def metric(http: httpx.Client, line: str) -> float:
    text = http.get("/metrics").text
    return next((float(one.rpartition(" ")[2]) for one in text.splitlines() if one.startswith(line)), 0.0)


def until(reached: Callable[[], bool], what: str) -> None:
    """A request is counted a moment after its client has its answer."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not reached():
        assert time.monotonic() < deadline_s, f"not within {DEADLINE_S:g} s: {what}"
        time.sleep(0.05)


def test_nonsense_is_refused(http: httpx.Client) -> None:
    """An unknown class is 400 in OpenAI's form, with the classes there are."""
    answer = ask(http, 1, "golden")
    assert answer.status_code == 400
    assert "there is no class 'golden', there is standard, interactive, hasty" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_ends_a_request_and_its_engines_work(http: httpx.Client, stream: bool) -> None:
    """An answer that would take far longer than its class's deadline is ended there: with 504, or as the last event of
    a stream that has begun. No replica goes on with it."""
    before = counts(http, "hasty").get("timed_out", 0)
    answer = ask(http, 500, "hasty", stream=stream)
    if stream:
        *events, end, done = [event.removeprefix("data: ") for event in answer.text.split("\n\n") if event]
        assert (answer.status_code, done) == (200, "[DONE]")
        assert all(json.loads(event)["choices"] for event in events) and len(events) > 1
        error = json.loads(end)["error"]
    else:
        assert answer.status_code == 504
        error = answer.json()["error"]
    assert (error["code"], "deadline of class hasty" in error["message"]) == (504, True)
    until(lambda: counts(http, "hasty").get("timed_out") == before + 1, "it is counted")
    assert metric(http, f'ellm_requests_in_flight{{model_name="{NAME}",ingress="0"}}') == 0


def test_overload_is_refused_and_patience_is_answered(http: httpx.Client) -> None:
    """Of six times what the replicas can hold, each asking for more time than its class's TTFT target allows two in a
    row, some are answered, and all others refused with 429 and when to come again. One of a class that must not be
    refused waits for its turn and is answered."""
    before = counts(http, "interactive")
    tokens = 3 * TOKENS_PER_S  # three seconds; the target is one
    with ThreadPoolExecutor(40) as pool:
        crowd = [
            pool.submit(ask, http, tokens, "interactive", user=f"user-{n % 3}", stream=n % 2 == 0) for n in range(24)
        ]
        patient = pool.submit(ask, http, 1, "standard")
        answers = [one.result() for one in crowd]
        assert patient.result().status_code == 200
    answered = [one for one in answers if one.status_code == 200]
    refused = [one for one in answers if one.status_code == 429]
    assert len(answered) + len(refused) == 24
    assert len(answered) >= PLACES and len(refused) >= 24 - 3 * PLACES
    for one in refused:
        assert int(one.headers["retry-after"]) >= 1
        assert one.json()["error"]["message"].startswith("refused: ")
    new = {"requests": 24, "answered": len(answered), "rejected": len(refused)}
    until(lambda: {key: counts(http, "interactive")[key] - before.get(key, 0) for key in new} == new, "all are counted")
    assert metric(http, f'ellm_requests_waiting{{model_name="{NAME}",ingress="0"}}') == 0


def test_counts_are_metrics_too(http: httpx.Client) -> None:
    """An answer raises the counters of its class, of its model and of the replica that gave it."""
    lines = [
        f'ellm_slo_requests_total{{model_name="{NAME}",class="interactive",ending="answered",ingress="0"}}',
        f'ellm_slo_kept_total{{model_name="{NAME}",class="interactive",ingress="0"}}',
        f'ellm_slo_ttft_seconds_count{{model_name="{NAME}",class="interactive",ingress="0"}}',
    ]
    before = [metric(http, line) for line in lines]
    replicas = [f'ellm_slo_replica_requests_total{{model_name="{NAME}",engine="{n}",ingress="0"}}' for n in (0, 1)]
    by_replica = sum(metric(http, line) for line in replicas)
    assert ask(http, 2, "interactive").status_code == 200
    until(lambda: [metric(http, line) for line in lines] == [value + 1 for value in before], "it is counted")
    assert sum(metric(http, line) for line in replicas) == by_replica + 1
