"""Reports of all ingress processes."""

from collections.abc import Callable
from typing import Any

import pytest

import cluster.ingress_peers
from cluster.ingress_peers import IngressPeers
from cluster.slo import SloAccount
from cluster.slo_ledger import SloLedger, SloReport
from cluster.slo_reports import SloReports

OTHER = SloReport(SloAccount(), 5.0)


class FakeApi:
    """The handle of the API's deployment, whose processes answer as ``answers`` says."""

    def __init__(self, answers: Callable[[], list[Any]]) -> None:
        self._answers = answers

    def broadcast(self, method: str) -> "FakeApi":
        assert method == "slo_report"
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert timeout_s > 0 and return_exceptions
        return self._answers()


def reports(monkeypatch: pytest.MonkeyPatch, answers: Callable[[], list[Any]], ingresses: int = 2) -> SloReports:
    monkeypatch.setattr(cluster.ingress_peers.serve, "get_deployment_handle", lambda *names: FakeApi(answers))
    return SloReports(SloLedger(), IngressPeers(ingresses))


async def test_all_that_answer_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that fails to answer is left out."""
    assert await reports(monkeypatch, lambda: [OTHER, RuntimeError("dead"), OTHER]).read() == [OTHER, OTHER]


async def test_where_somebody_is_stuck_the_own_one_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that does not answer at all hides no more than the others' counts."""

    def stuck() -> list[Any]:
        raise TimeoutError

    assert len(await reports(monkeypatch, stuck).read()) == 1


async def test_a_single_process_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one ingress there is nothing to ask."""

    def asked() -> list[Any]:
        raise AssertionError

    assert len(await reports(monkeypatch, asked, ingresses=1).read()) == 1
