"""What steps are charged, how they may run, and what is learned from them."""

import pytest

from replicas.activation_ledger import ActivationLedger, ActivationSample

TOKEN, ROW = 1000, 500


def ledger(ranks: int = 1) -> ActivationLedger:
    """One that has seen exact steps of what it assumed."""
    made = ActivationLedger(TOKEN, ROW, ranks)
    for tokens in (16, 1024):
        made.observe(ActivationSample(tokens, 1, False, tokens * TOKEN, 0))
    return made


def test_the_first_steps_are_exact_whatever_the_room() -> None:
    """Only such steps teach what a step needs."""
    fresh = ActivationLedger(TOKEN, ROW, 1)
    assert not fresh.allow(1 << 40, wanted=100, least=1, rows=1, now=0.0).keep
    fresh.observe(ActivationSample(100, 1, False, 100 * TOKEN, 0))
    assert fresh.allow(1 << 40, wanted=100, least=1, rows=1, now=0.1).keep


def test_a_tight_step_gets_what_fits_and_at_least_the_decodes() -> None:
    one = ledger()
    room = one.bytes_for(300, 1)
    assert one.allow(room, wanted=1000, least=8, rows=1, now=0.0).tokens == 300
    assert one.allow(0, wanted=1000, least=8, rows=1, now=0.0).tokens == 8
    assert one.allow(-5, wanted=1000, least=8, rows=1, now=0.0).tokens == 8


@pytest.mark.parametrize("ranks", [1, 2])
def test_bytes_count_over_all_ranks(ranks: int) -> None:
    assert ledger(ranks).bytes_for(512, 1) >= ranks * 512 * TOKEN


def test_kept_activations_are_charged_as_measured() -> None:
    """By the estimate until the step is reported, by what the heap holds afterwards, and not again by smaller steps."""
    one = ledger()
    assert one.allow(1 << 30, wanted=500, least=1, rows=1, now=0.0).keep
    one.on_step(500, 1)
    assert one.charged_bytes >= 2 * 500 * TOKEN
    one.on_step(1, 1)
    one.observe(ActivationSample(500, 1, True, 700_000, 650_000))
    one.on_step(1, 1)
    one.on_step(1, 1)
    assert one.charged_bytes == 650_000


def test_leaving_the_kept_way_trims_once_and_lasts() -> None:
    """The charge goes with the trim; a moment of room does not bring the kept way back."""
    one = ledger()
    one.allow(1 << 30, wanted=500, least=1, rows=1, now=0.0)
    one.on_step(500, 1)
    one.observe(ActivationSample(500, 1, True, 900_000, 900_000))
    tight = one.allow(600_000, wanted=500, least=1, rows=1, now=1.0)
    assert tight.trim
    assert not tight.keep
    assert one.charged_bytes == 0
    one.on_step(500, 1)
    assert 500 * TOKEN <= one.charged_bytes <= 600_000
    again = one.allow(1 << 30, wanted=500, least=1, rows=1, now=1.5)
    assert (again.trim, again.keep) == (False, False)
    assert one.allow(1 << 30, wanted=500, least=1, rows=1, now=3.5).keep


def test_steps_that_the_heap_kept_teach_nothing() -> None:
    """Their peak contains what earlier steps had left."""
    one = ledger()
    before = one.bytes_for(100, 1)
    one.observe(ActivationSample(100, 1, True, 1 << 40, 1 << 40))
    assert one.bytes_for(100, 1) == before


def test_decodes_teach_the_logits() -> None:
    """Many requests that sample can need more than their few tokens."""
    one = ledger()
    for rows in (1, 32):
        one.observe(ActivationSample(rows, rows, False, rows * 312_500, 0))
    assert one.bytes_for(32, 32) >= 10_000_000
    assert one.bytes_for(32, 1) < 1_000_000
