"""Targets of requests, and what counts as kept."""

import math

import pytest

from cluster.bench.report import Slo
from cluster.config import SloClass
from cluster.slo import Ending, Outcome, SloAccount, SloHeaderError, class_targets, request_targets

CLASSES = [SloClass(name="chat", ttft_ms=500.0, tpot_ms=50.0), SloClass(name="batch", ttft_ms=60_000.0)]


def outcome(ending: Ending = Ending.ANSWERED, ttft_s: float = 0.1, **other: str) -> Outcome:
    names = {"slo_class": "chat", "model": "m", "replica": "r"} | other
    return Outcome(**names, slo=class_targets(CLASSES[0]), ending=ending, ttft_s=ttft_s, tpot_s=0.01, output_tokens=7)


@pytest.mark.parametrize("ending", [Ending.REJECTED, Ending.FAILED, Ending.TIMED_OUT])
def test_whoever_got_no_answer_is_a_miss(ending: Ending) -> None:
    """Rejected, failed and timed-out requests count, and as misses, however good their times look."""
    account = SloAccount()
    account.add(outcome())
    account.add(outcome(ending))
    assert account.total.attainment == 0.5


def test_a_request_that_its_client_gave_up_counts_as_neither() -> None:
    """A cancelled request changes no share."""
    account = SloAccount()
    account.add(outcome())
    account.add(outcome(Ending.CANCELLED))
    assert (account.total.counted, account.total.attainment) == (1, 1.0)


def test_late_and_missing_times_are_misses() -> None:
    """A first token after the target is a miss, and so is one that has no time at all."""
    assert outcome().kept
    assert not outcome(ttft_s=0.6).kept
    assert not outcome(ttft_s=math.nan).kept


def test_counts_by_class_model_and_replica_and_goodput_by_seconds() -> None:
    """Each request is counted once in each of its three tallies; goodput is what was kept, by time."""
    account = SloAccount()
    account.add(outcome(replica="a"))
    account.add(outcome(replica="b", slo_class="batch", ttft_s=9.0))
    account.add(outcome(Ending.REJECTED, replica=""))
    assert {name: one.counted for name, one in account.by_replica.items()} == {"a": 1, "b": 1, "none": 1}
    tree = account.to_json(duration_s=2.0)
    assert tree["classes"]["chat"]["attainment"] == 0.5
    assert tree["models"]["m"]["goodput_requests_per_s"] == 0.5
    assert tree["total"]["goodput_tokens_per_s"] == 3.5


def test_nothing_counted_has_no_attainment() -> None:
    """Without requests there is no share, and JSON says so."""
    assert math.isnan(SloAccount().total.attainment)
    assert SloAccount().to_json(0.0)["total"]["attainment"] is None


def test_merged_accounts_count_what_each_has_counted() -> None:
    """Two accounts as one are what one account of all requests would be, and the second stays as it was."""
    every, parts = SloAccount(), (SloAccount(), SloAccount())
    for number, one in enumerate((outcome(), outcome(Ending.FAILED, replica="b"), outcome(slo_class="batch"))):
        every.add(one)
        parts[number % 2].add(one)
    alone = parts[1].to_json(1.0)
    parts[0].merge(parts[1])
    assert parts[0].to_json(1.0) == every.to_json(1.0)
    assert parts[0].by_replica == every.by_replica
    assert parts[1].to_json(1.0) == alone


def test_headers_choose_class_and_targets() -> None:
    """The first class is the default; a header's target replaces the class's own."""
    assert request_targets(CLASSES, {}) == (CLASSES[0], Slo(500.0, 50.0))
    chosen, slo = request_targets(CLASSES, {"x-slo-class": "batch", "x-slo-tpot-ms": "20"})
    assert (chosen.name, slo) == ("batch", Slo(60_000.0, 20.0))


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"x-slo-class": "gold"}, "no class 'gold', there is chat, batch"),
        ({"x-slo-ttft-ms": "fast"}, "x-slo-ttft-ms: 'fast' is no target"),
        ({"x-slo-ttft-ms": "-3"}, "milliseconds above 0"),
        ({"x-slo-tpot-ms": "nan"}, "x-slo-tpot-ms: 'nan'"),
        ({"x-slo-tpot-ms": "inf"}, "at most a day"),
    ],
)
def test_nonsense_in_headers_is_refused(headers: dict[str, str], words: str) -> None:
    """A class or a target that is none is an error that says what would be one."""
    with pytest.raises(SloHeaderError, match=words):
        request_targets(CLASSES, headers)
