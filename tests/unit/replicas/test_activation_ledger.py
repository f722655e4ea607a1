"""What steps are charged, how they may run, and what is learned from them."""

import pytest

from replicas.activation_ledger import ActivationLedger, ActivationSample, StepAllowance

TOKEN, ROW = 1000, 500


def ledger(ranks: int = 1) -> ActivationLedger:
    """One that has seen exact steps of what it assumed."""
    made = ActivationLedger(TOKEN, ROW, ranks)
    for tokens in (16, 1024):
        made.observe(ActivationSample(tokens, 1, False, tokens * TOKEN, 0))
    return made


def allow(one: ActivationLedger, room: int, wanted: int, least: int = 1, now: float = 0.0) -> StepAllowance:
    """A step of one row, with the same room whatever its tokens."""
    return one.allow(lambda tokens: room, room, wanted, least, 1, now)


def test_the_first_steps_are_exact_whatever_the_room() -> None:
    """Only such steps teach what a step needs."""
    fresh = ActivationLedger(TOKEN, ROW, 1)
    assert not allow(fresh, 1 << 40, 100, 1, 0.0).keep
    fresh.observe(ActivationSample(100, 1, False, 100 * TOKEN, 0))
    assert allow(fresh, 1 << 40, 100, 1, 0.1).keep


def test_a_tight_step_gets_what_fits_and_at_least_the_decodes() -> None:
    one = ledger()
    room = one.bytes_for(300, 1)
    assert allow(one, room, 1000, 8, 0.0).tokens == 300
    assert allow(one, 0, 1000, 8, 0.0).tokens == 8
    assert allow(one, -5, 1000, 8, 0.0).tokens == 8


def test_kv_memory_and_tokens_share_the_room() -> None:
    """The largest step of which both fit: here each token takes as much KV memory as activations."""
    one = ledger()
    lease = 2 * one.bytes_for(500, 1)
    allowance = one.allow(lambda tokens: lease - one.bytes_for(tokens, 1), 0, 1000, 1, 1, 0.0)
    assert allowance.tokens == 500
    assert allowance.charged_bytes == one.bytes_for(500, 1)


def test_a_step_is_cut_to_the_room_that_was_found() -> None:
    one = ledger()
    planned = allow(one, one.bytes_for(500, 1), 1000)
    cut = one.cut(planned, one.bytes_for(200, 1), least=8, rows=1)
    assert (cut.tokens, cut.charged_bytes) == (200, one.bytes_for(200, 1))
    assert one.cut(planned, 0, least=8, rows=1).tokens == 8
    assert one.cut(planned, one.bytes_for(900, 1), least=8, rows=1) == planned


@pytest.mark.parametrize("ranks", [1, 2])
def test_bytes_count_over_all_ranks(ranks: int) -> None:
    assert ledger(ranks).bytes_for(512, 1) >= ranks * 512 * TOKEN


def test_kept_activations_are_charged_as_measured() -> None:
    """By the estimate until the step is reported, by what the heap holds afterwards, and not again by smaller steps."""
    one = ledger()
    assert allow(one, 1 << 30, 500, 1, 0.0).keep
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
    allow(one, 1 << 30, 500, 1, 0.0)
    one.on_step(500, 1)
    one.observe(ActivationSample(500, 1, True, 900_000, 900_000))
    tight = allow(one, 600_000, 500, 1, 1.0)
    assert tight.trim
    assert not tight.keep
    assert one.charged_bytes == 0
    one.on_step(500, 1)
    assert 500 * TOKEN <= one.charged_bytes <= 600_000
    again = allow(one, 1 << 30, 500, 1, 1.5)
    assert (again.trim, again.keep) == (False, False)
    assert allow(one, 1 << 30, 500, 1, 3.5).keep


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
