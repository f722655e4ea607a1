"""A scripted load on a cluster that makes everything happen that dashboards show: memory moves and runs short, requests
are preempted, moved, refused, and go on elsewhere when a replica dies."""

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import httpx
import psutil

from tests.integration.watching import until

PATIENT, SHED = "patient", "hasty"
"""SLO classes. Who is of the second is refused where the first token would come too late."""
TALKERS = 6
CONVERSATIONS = 3
"""Of each talker, in turn: so that what it asked for before has left the device meanwhile."""
CALM_S, CROWD_S = 10.0, 40.0
PATIENCE_S = 240.0
SCRAPES_S = 3.0
"""For a Prometheus to see it, which looks once a second."""
HAPPENS = (
    "ellm_preemptions_total{",
    "ellm_set_aside_total{",
    'event="stored"',
    'event="loaded"',
    'ending="rejected"',
)
"""Parts of lines of /metrics that are not 0: what the crowd has made happen before a replica dies."""

CONFIG = {
    "models": [
        {"name": "m", "dtype": "float32", "replicas": 2, "max_model_len": 768, "max_num_seqs": 4},
    ],
    "memory": {"budget": "128MiB", "host_buffer": "96MiB"},
    "slo": [
        {"name": PATIENT, "ttft_ms": 8000.0, "tpot_ms": 600.0, "sheddable": False},
        {"name": SHED, "ttft_ms": 500.0, "tpot_ms": 600.0, "sheddable": True},
    ],
}


class Load:
    """The clients of one cluster, and the codes that they were answered with."""

    def __init__(self, url: str) -> None:
        self.answers: Counter[tuple[str, int]] = Counter()
        self._http = httpx.Client(base_url=url, timeout=300, trust_env=False)
        self._ends = Event()

    def play(self) -> None:
        """The script: calm, one request that moves, one that comes again, a drain, a crowd, a death in the middle of
        it, calm."""
        time.sleep(CALM_S)
        self._move_a_request()
        self._come_again()
        self._drain_a_replica()
        with ThreadPoolExecutor(TALKERS + 2) as pool:
            crowd = [pool.submit(self._talk, number) for number in range(TALKERS)]
            crowd += [pool.submit(self._press) for _ in range(2)]
            try:
                time.sleep(CROWD_S)
                until(lambda: not self._missing(), "all that a crowd makes happen", PATIENCE_S)
                self._kill_a_replica()
                time.sleep(CROWD_S)
            finally:
                self._ends.set()
            for one in crowd:
                one.result()
        time.sleep(CALM_S)

    def _replicas(self) -> dict[str, dict[str, Any]]:
        """What engines have reported lately, by their replicas' ids."""
        nodes = self._http.get("/ellm/status").json()["nodes"]
        return {one["engine_id"]: one for node in nodes for device in node["devices"] for one in device["replicas"]}

    def _missing(self) -> list[str]:
        lines = self._http.get("/metrics").text.splitlines()
        happened = [line for line in lines if not line.endswith(" 0.0")]
        return [what for what in HAPPENS if not any(what in line for line in happened)]

    def _ask(self, prompt: str, tokens: int, slo_class: str) -> None:
        body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
        answer = self._http.post("/v1/completions", json=body, headers={"x-slo-class": slo_class})
        self.answers[slo_class, answer.status_code] += 1

    def _talk(self, number: int) -> None:
        turn = 0
        while not self._ends.is_set():
            turn += 1
            said = " ".join(f"{number}.{turn % CONVERSATIONS} says {word}," for word in range(45))
            self._ask(f"{said} turn {turn}", 130, PATIENT)

    def _press(self) -> None:
        """Of a class that is refused under overload."""
        while not self._ends.wait(0.5):
            self._ask("Hello", 20, SHED)

    def _move_a_request(self) -> None:
        """By hand, while its tokens stream; it has all of them in the end."""
        body = {"model": "m", "prompt": "tell " * 200, "max_tokens": 400, "ignore_eos": True, "stream": True}
        body["stream_options"] = {"include_usage": True}
        events, moved = [], False
        with self._http.stream("POST", "/v1/completions", json=body, headers={"x-slo-class": PATIENT}) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    events.append(json.loads(line.removeprefix("data: ")))
                    if len(events) > 20 and not moved:
                        self._migrate(events[-1]["id"])
                        moved = True
        assert moved
        assert events[-1]["usage"]["completion_tokens"] == 400, events[-1]

    def _migrate(self, request_id: str) -> None:
        tried = [
            self._http.post("/ellm/migrate", json={"request_id": request_id, "to": replica})
            for replica in self._replicas()
        ]
        assert any(one.status_code == 200 for one in tried), [one.text for one in tried]

    def _come_again(self) -> None:
        """A client that hangs up in the middle of its answer, and asks for it again."""
        body = {"model": "m", "prompt": "tell again", "max_tokens": 60, "ignore_eos": True, "stream": True}
        headers = {"x-slo-class": PATIENT, "idempotency-key": "again"}
        with self._http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            next(answer.iter_lines())
        answer = self._http.post("/v1/completions", json=body | {"stream": False}, headers=headers)
        assert answer.json()["usage"]["completion_tokens"] == 60, answer.text

    def _drain_a_replica(self) -> None:
        """For a moment."""
        target = min(self._replicas())
        for undo in (False, True):
            answer = self._http.post("/ellm/drain", json={"target": target, "undo": undo})
            assert answer.status_code == 202, answer.text
            until(lambda undo=undo: bool(self._http.get("/ellm/drains").json()["drains"]) != undo, "it is said", 30)
            time.sleep(SCRAPES_S)

    def _kill_a_replica(self) -> None:
        """One with a prompt that has no token yet, beside others that have; another replica takes its place."""
        before = self._replicas()
        with ThreadPoolExecutor(2) as pool:
            fresh = [pool.submit(self._ask, f"{number} {'word ' * 500}", 20, PATIENT) for number in range(2)]
            until(self._kills, "a prompt that waits for its first token", PATIENCE_S)
            for one in fresh:
                one.result()
        until(lambda: len(now := self._replicas()) == 2 and now.keys() != before.keys(), "two replicas", PATIENCE_S)

    def _kills(self) -> bool:
        waiting = [one for one in self._replicas().values() if one["ttft_share"] > 0 and one["running"] > 1]
        for one in waiting[:1]:
            replica = psutil.Process(one["pid"]).parent()
            assert replica is not None and "ServeReplica:ellm-model:m" in " ".join(replica.cmdline()), replica
            replica.kill()
        return bool(waiting)
