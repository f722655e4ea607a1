"""What an ingress process has counted, and what all of them have."""

from cluster.bench.report import Slo
from cluster.slo import Ending, Outcome
from cluster.slo_ledger import SloLedger, SloReport, to_json


def outcome(model: str = "small", ending: Ending = Ending.ANSWERED, ttft_s: float = 0.1) -> Outcome:
    return Outcome("chat", model, "r", Slo(ttft_ms=500.0), ending, ttft_s, 0.01, 1.0, output_tokens=7)


def test_models_have_accounts_of_their_own() -> None:
    """What one model's requests did is not the other's; the report is over both."""
    ledger = SloLedger()
    ledger.add(outcome())
    ledger.add(outcome("large", Ending.FAILED))
    assert ledger.account("small").total.attainment == 1.0
    assert ledger.account("large").total.attainment == 0.0
    assert ledger.account("unknown").total.counted == 0
    assert ledger.report().account.total.attainment == 0.5


def test_reports_of_all_processes_are_one() -> None:
    """Counts add up, and rates are over the life of the oldest."""
    ledgers = [SloLedger(), SloLedger()]
    for ledger in ledgers:
        ledger.add(outcome())
    tree = to_json([SloReport(one.report().account, seconds) for one, seconds in zip(ledgers, (1.0, 4.0), strict=True)])
    assert (tree["ingresses"], tree["duration_s"]) == (2, 4.0)
    assert tree["classes"]["chat"]["answered"] == 2
    assert tree["models"]["small"]["goodput_requests_per_s"] == 0.5


def test_nobody_has_counted_anything() -> None:
    """Without requests, and without reports, there is JSON all the same."""
    for reports in ([], [SloLedger().report()]):
        assert to_json(reports)["total"]["attainment"] is None
