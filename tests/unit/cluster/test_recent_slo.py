"""Attainment of the last minute, from counts since the start."""

from typing import Any

from cluster.bench.report import Slo
from cluster.recent_slo import RecentSlo
from cluster.slo import Ending, Outcome, SloAccount
from cluster.slo_ledger import SloReport, to_json


def counts(**by_class: tuple[int, int]) -> Any:
    """Of each class so many requests that kept their target, and so many that did not."""
    account = SloAccount()
    for name, (kept, missed) in by_class.items():
        for number in range(kept + missed):
            ttft_s = 0.1 if number < kept else 9.0
            account.add(Outcome(name, "m", "r", Slo(ttft_ms=1000.0), Ending.ANSWERED, ttft_s, 0.01, 1.0, 5))
    return to_json([SloReport(account, 100.0)])


def test_what_was_before_the_window_does_not_count() -> None:
    """A bad hour that is over does not hide behind, nor spoil, the last minute."""
    recent = RecentSlo(window_s=60.0)
    recent.add(counts(chat=(0, 50)), 0.0)
    now = recent.add(counts(chat=(10, 50)), 60.0)
    assert (now["window_s"], now["classes"]["chat"]["kept"], now["classes"]["chat"]["attainment"]) == (60.0, 10, 1.0)
    later = recent.add(counts(chat=(10, 51)), 90.0)
    assert later["classes"]["chat"]["attainment"] == 10 / 11
    last = recent.add(counts(chat=(10, 51)), 151.0)
    assert last["classes"]["chat"]["attainment"] is None


def test_a_class_that_is_new_counts_from_nothing() -> None:
    """Its first requests came within the window."""
    recent = RecentSlo()
    recent.add(counts(chat=(1, 0)), 0.0)
    now = recent.add(counts(chat=(1, 0), batch=(3, 1)), 1.0)
    assert now["classes"]["batch"]["requests"] == 4
    assert now["classes"]["chat"]["requests"] == 0


def test_counts_that_fall_begin_anew() -> None:
    """An ingress that was replaced has forgotten: nothing is ever negative."""
    recent = RecentSlo()
    recent.add(counts(chat=(9, 9)), 0.0)
    now = recent.add(counts(chat=(1, 0)), 1.0)
    assert now == {"window_s": 0.0, "classes": {"chat": now["classes"]["chat"]}}
    assert all(not value for value in now["classes"]["chat"].values())
    assert recent.add(counts(chat=(2, 0)), 2.0)["classes"]["chat"]["kept"] == 1
