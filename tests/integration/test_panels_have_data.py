"""Every panel of every dashboard, over a real Prometheus that scrapes a real cluster under a load that makes everything
happen which they show."""

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import yaml

from dashboards.board import Board
from dashboards.boards import BOARDS
from dashboards.files import export_files, write_files
from tests.integration.panels_load import CONFIG, PATIENT, SHED, Load
from tests.integration.served_cluster import answers, program, served
from tests.integration.watching import free_port
from tests.unit.dashboards.prometheus_binaries import binary

pytestmark = pytest.mark.slow

RATE_WINDOW = "15s"
STEP_S = 2
_LEASES = ("ellm-device-memory", "Leases")
STEADY = {
    (*_LEASES, "{{replica}} guarantee"): "a setting, the same for the life of a replica",
    (*_LEASES, "{{replica}} overdue"): "needs an engine that gives nothing back for 5 s, as a stopped one",
}
"""(dashboard, panel, legend) of the queries whose numbers do not change in this run, and why."""


@dataclass(frozen=True)
class Watched:
    """A Prometheus, the Unix time from which on it has watched, and what became of the load's requests."""

    url: str
    since_s: float
    load: Load

    def get(self, path: str, **asked: Any) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=asked, trust_env=False, timeout=60)
        assert answer.status_code == 200, f"{asked}: {answer.text}"
        return answer.json()["data"]

    def drawn(self, expr: str) -> list[list[float]]:
        """What a panel would draw of ``expr``, with all of every variable chosen: the numbers of each series."""
        now_s = time.time()
        expr = expr.replace("$__rate_interval", RATE_WINDOW).replace("$__range", f"{now_s - self.since_s:.0f}s")
        expr = re.sub(r"\$\w+", ".*", expr)
        found = self.get("query_range", query=expr, start=self.since_s, end=now_s, step=STEP_S)["result"]
        series = ([float(text) for _, text in one["values"]] for one in found)
        return [finite for numbers in series if (finite := [one for one in numbers if math.isfinite(one)])]

    def most(self, expr: str) -> float:
        return max((max(numbers) for numbers in self.drawn(expr)), default=0.0)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """The load has been played."""
    prometheus, folder = binary("prometheus"), tmp_path_factory.mktemp("panels")
    with served(CONFIG, folder) as url:
        watch = f"http://127.0.0.1:{free_port()}"
        files = export_files(url, watch, 0.99, "docs/runbooks")
        how = yaml.safe_load(files["prometheus.yaml"])
        how["global"] = {"scrape_interval": "1s", "evaluation_interval": "5s"}
        write_files(folder, files | {"prometheus.yaml": yaml.safe_dump(how)})
        command = [
            prometheus,
            f"--config.file={folder}/prometheus.yaml",
            f"--storage.tsdb.path={folder}/tsdb",
            f"--web.listen-address={watch.removeprefix('http://')}",
        ]
        with program(command, folder / "prometheus.log", lambda: answers(f"{watch}/-/ready")):
            since_s, load = time.time(), Load(url)
            load.play()
            yield Watched(watch, since_s, load)


def test_the_load_does_what_it_should(watched: Watched) -> None:
    """Preemption, memory that moves, a host buffer that helps, a migration, refusals and a death have happened; and all
    that clients saw of it are the refusals, of the class that may be refused."""
    for happened in (
        "sum(ellm_preemptions_total)",
        'sum(ellm_kv_moved_bytes_total{direction="inflate"})',
        'sum(ellm_kv_moved_bytes_total{direction="deflate"})',
        'sum(ellm_host_buffer_events_total{event="loaded"})',
        'sum(ellm_slo_requests_total{ending="rejected"})',
        "sum(ellm_device_dead_engines_total)",
        "sum(ellm_requests_continued_total)",
        "sum(ellm_requests_retried_total)",
        "sum(ellm_requests_resumed_total)",
    ):
        assert watched.most(happened) > 0, happened
    assert set(watched.load.answers) == {(PATIENT, 200), (SHED, 200), (SHED, 429)}


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)
def test_every_query_has_data_that_moves(watched: Watched, board: Board) -> None:
    """No query of a panel comes back empty, and each changes, but for those that are listed with the reason."""
    empty, still = [], set()
    for panel in board.panels:
        for query in panel.queries:
            drawn = watched.drawn(query.expr)
            if not drawn:
                empty.append((panel.title, query.expr))
            elif not any(len(set(numbers)) > 1 for numbers in drawn):
                still.add((board.uid, panel.title, query.legend))
    assert not empty
    assert still <= STEADY.keys()


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)
def test_every_variable_and_annotation_has_values(watched: Watched, board: Board) -> None:
    """There is something to choose, and there are marks."""
    for variable in board.variables:
        asked = {"match[]": variable.metric, "start": watched.since_s, "end": time.time()}
        assert watched.get(f"label/{variable.label}/values", **asked), variable
    for annotation in board.annotations:
        assert watched.drawn(annotation.expr), annotation
