"""Alerts of the exported rules, unchanged, from a real Prometheus through a real Alertmanager to who is woken. What is
scraped is the text that a cluster exports, of a made-up device."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from cluster.api_metrics import cluster_families
from cluster.cluster_view import ClusterView
from cluster.metrics_text import merged_text, text_families
from cluster.scrape_targets import target_list
from dashboards.files import export_files, write_files
from tests.integration.served_cluster import answers, program
from tests.integration.watching import free_port, until
from tests.unit.cluster.test_controller import BOUNDS, report
from tests.unit.dashboards.prometheus_binaries import binary

pytestmark = pytest.mark.slow

DELIVERY_S = 240.0
RUNBOOKS = "https://runbooks.example.org"


class Cluster:
    """What Prometheus reads of a cluster with one device, whose agent reports before each scrape."""

    def __init__(self, port: int) -> None:
        self.dead_engines = self.scrapes = 0
        self._port, self._view = port, ClusterView(BOUNDS, epoch_ms=1_000)

    def answer(self, path: str, body: bytes) -> str:
        if path == "/metrics/targets":
            return json.dumps(target_list(f"127.0.0.1:{self._port}", "http", []))
        self.scrapes += 1
        self._view.receive(report(self.scrapes, dead_engines=self.dead_engines), float(self.scrapes))
        return merged_text([text_families(cluster_families(self._view.measures(float(self.scrapes))))])


class Woken:
    """Who gets what Alertmanager sends."""

    def __init__(self) -> None:
        self.alerts: list[dict[str, Any]] = []

    def answer(self, path: str, body: bytes) -> str:
        self.alerts += json.loads(body)["alerts"]
        return ""

    def firing(self) -> dict[str, dict[str, Any]]:
        return {one["labels"]["alertname"]: one for one in self.alerts if one["status"] == "firing"}


@contextmanager
def http_server(port: int, answer: Callable[[str, bytes], str]) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            text = answer(self.path, body).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json" if text[:1] == b"[" else "text/plain; version=0.0.4")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def monitoring(folder: Path, cluster_port: int, woken_port: int) -> Iterator[None]:
    """Prometheus with the exported files, at one scrape a second, and an Alertmanager behind it that waits for
    nothing."""
    watch, manager = free_port(), free_port()
    files = export_files(f"http://127.0.0.1:{cluster_port}", f"http://127.0.0.1:{watch}", 0.99, RUNBOOKS)
    prometheus = yaml.safe_load(files["prometheus.yaml"])
    prometheus["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    prometheus["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{manager}"]}]}]}
    alertmanager = {
        "route": {"receiver": "woken", "group_by": ["alertname"], "group_wait": "1s"},
        "receivers": [{"name": "woken", "webhook_configs": [{"url": f"http://127.0.0.1:{woken_port}/"}]}],
    }
    mine = {"prometheus.yaml": yaml.safe_dump(prometheus), "alertmanager.yaml": yaml.safe_dump(alertmanager)}
    write_files(folder, files | mine)
    commands = {
        manager: [
            binary("prometheus-alertmanager"),
            f"--config.file={folder}/alertmanager.yaml",
            f"--storage.path={folder}/alerts",
            f"--web.listen-address=127.0.0.1:{manager}",
            "--cluster.listen-address=",
        ],
        watch: [
            binary("prometheus"),
            f"--config.file={folder}/prometheus.yaml",
            f"--storage.tsdb.path={folder}/tsdb",
            f"--web.listen-address=127.0.0.1:{watch}",
        ],
    }
    with ExitStack() as stack:
        for port, command in commands.items():
            ready = partial(answers, f"http://127.0.0.1:{port}/-/ready")
            stack.enter_context(program(command, folder / f"{port}.log", ready))
        yield


def test_alerts_reach_who_is_woken(tmp_path: Path) -> None:
    """Engines that die again and again, and then a cluster that does not answer at all: for each there is one page, of
    that severity, and with the link to its runbook. A cluster that is well wakes nobody."""
    port, woken_port, woken = free_port(), free_port(), Woken()
    cluster = Cluster(port)
    with http_server(woken_port, woken.answer), monitoring(tmp_path, port, woken_port):
        with http_server(port, cluster.answer):
            until(lambda: cluster.scrapes > 20, "it is scraped", DELIVERY_S)
            assert not woken.alerts
            cluster.dead_engines = 5
            until(lambda: bool(woken.alerts), "an alert of dying engines", DELIVERY_S)
            (flapping,) = woken.alerts
            assert flapping["labels"].items() >= {
                "alertname": "EllmReplicasFlapping", "severity": "page", "node": "n1", "device": "cpu",
            }.items()  # fmt: skip
            assert flapping["annotations"]["runbook_url"] == f"{RUNBOOKS}/replicas-flapping.md"
        until(lambda: "EllmAway" in woken.firing(), "an alert of a cluster that is away", DELIVERY_S)
        away = woken.firing()["EllmAway"]
        assert away["labels"]["severity"] == "page"
        assert away["annotations"]["runbook_url"] == f"{RUNBOOKS}/away.md"
        assert away["annotations"]["summary"] == f"127.0.0.1:{port} does not answer"
