"""What steps are charged, how many tokens they may have, and what is learned from them."""

import pytest

from replicas.activation_ledger import ActivationLedger, ActivationSample

TOKEN, ROW = 1000, 500


def ledger(ranks: int = 1) -> ActivationLedger:
    """One that has seen steps of what it assumed."""
    made = ActivationLedger(TOKEN, ROW, ranks)
    for tokens in (16, 1024):
        made.observe(ActivationSample(tokens, 1, tokens * TOKEN, 0))
    return made


def tokens_in(one: ActivationLedger, room: int, least: int = 8) -> int:
    """Tokens of a step of one request, with the same room whatever its tokens."""
    return one.allow(lambda tokens: room, least, 1000, 1).tokens


def test_a_tight_step_gets_what_fits_and_at_least_the_decodes() -> None:
    one = ledger()
    assert tokens_in(one, one.bytes_for(300, 1)) == 300
    assert tokens_in(one, 1 << 40) == 1000
    assert tokens_in(one, 0) == 8
    assert tokens_in(one, -5) == 8


def test_kv_memory_and_tokens_share_the_room() -> None:
    """The largest step of which both fit: here each token takes as much KV memory as activations."""
    one = ledger()
    lease = 2 * one.bytes_for(500, 1)
    allowance = one.allow(lambda tokens: lease - one.bytes_for(tokens, 1), 1, 1000, 1)
    assert (allowance.tokens, allowance.charged_bytes) == (500, one.bytes_for(500, 1))


@pytest.mark.parametrize("ranks", [1, 2])
def test_bytes_count_over_all_ranks(ranks: int) -> None:
    assert ledger(ranks).bytes_for(512, 1) >= ranks * 512 * TOKEN


def test_heaps_keep_what_nothing_else_wants() -> None:
    """Half of it, from four steps' worth on; while they keep some, down to two; nothing beside a step that is larger
    than all that were measured. What they may keep is charged, and what they do keep is seen, until the engine rests; a
    step that found memory to reuse teaches nothing."""
    one = ledger()
    one.observe(ActivationSample(1, 1, ROW, 0))
    step = one.bytes_for(100, 1)
    assert one.keep_in(7 * step, 100, 1) == 0
    one.keep_bytes = one.keep_in(8 * step, 100, 1)
    assert one.keep_bytes == 4 * step
    assert one.keep_in(4 * step, 100, 1) == 2 * step
    assert one.keep_in(3 * step, 100, 1) == 0
    assert one.keep_in(1 << 40, 1025, 1) == one.keep_in(1 << 40, 100, 2) == 0
    one.on_step(100, 1)
    assert one.charged_bytes == 5 * step
    one.observe(ActivationSample(100, 1, None, 7000))
    assert (one.held_bytes, one.charged_bytes) == (7000, 5 * step)
    assert one.bytes_for(100, 1) == step
    one.on_rest()
    assert (one.held_bytes, one.charged_bytes) == (0, 0)


def test_decodes_teach_the_logits() -> None:
    """Many requests that sample can need more than their few tokens."""
    one = ledger()
    for rows in (1, 32):
        one.observe(ActivationSample(rows, rows, rows * 312_500, 0))
    assert one.bytes_for(32, 32) >= 10_000_000
    assert one.bytes_for(32, 1) < 1_000_000
