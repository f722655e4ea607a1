"""Tails of preempted requests: which KV they are, when they are found, and when their slots are free. No engine."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicas.break_even import ENOUGH, Move
from replicas.host_moves import HostReport, HostWork
from replicas.host_traffic import HostTraffic
from replicas.kv_tail import KvTail, KvTails, tail_of

SLOTS, TOKENS, BLOCK_BYTES = 3, 16, 4096


class Desk:
    """Tails over traffic of one rank, whose worker the test plays. A move costs ``move_tokens`` tokens of prefill."""

    def __init__(self, move_tokens: float = 0.1) -> None:
        self.traffic = HostTraffic(SLOTS, BLOCK_BYTES, TOKENS, ranks=1, clock=lambda: 0.0)
        self.tails = KvTails(self.traffic, TOKENS, b"f" * 32)
        for _ in range(ENOUGH):
            self.traffic.break_even.observe_prefill(TOKENS, TOKENS)
            for move in Move:
                self.traffic.break_even.observe_move(move, BLOCK_BYTES, move_tokens)

    def keep(self, request_id: str, computed: int, block_id: int = 7) -> None:
        tail = tail_of(request_id, computed, 0, TOKENS)
        assert tail is not None
        self.tails.keep(tail, block_id)

    def step(self) -> HostWork:
        """The workers get what is to be done, and have not answered."""
        return self.traffic.take()

    def answer(self, work: HostWork, lost: bool = False) -> None:
        """The rank has done all of it, or could neither write nor read anything."""
        keys = [[copy.key for copy in copies] if lost else [] for copies in (work.store, work.load)]
        self.tails.on_landed(self.traffic.on_reports([HostReport(work.sequence, *keys)]))
        self.traffic.buffer.check_conservation()

    def stored(self, request_id: str, computed: int) -> None:
        """A tail that is in the host buffer."""
        self.keep(request_id, computed)
        self.answer(self.step())

    def resume(self, request_id: str, present: int, tokens: int) -> int:
        """The request is let in: tokens of its tail that are to be loaded."""
        found = self.tails.match(request_id, present, tokens)
        self.tails.allocate(request_id, list(range(100, 110)), found)
        return found

    @property
    def taken(self) -> int:
        return self.traffic.buffer.taken_slots


@given(st.integers(1, 500), st.integers(0, 1), st.integers(1, 40))
def test_a_tail_is_what_no_block_with_a_hash_holds(computed: int, unknown: int, block_tokens: int) -> None:
    """One block, from its first token on. With a step in flight its last token is not known, and the block that it
    fills has no hash yet: such a tail fills its block."""
    tail = tail_of("r", computed, unknown, block_tokens)
    hashed = (computed - unknown) // block_tokens * block_tokens
    if tail is None:
        assert hashed == computed
    else:
        assert (tail.first_token, tail.generation) == (hashed, computed)
        assert 1 <= tail.tokens <= block_tokens


def test_a_tail_is_one_block() -> None:
    """With more steps in flight than one it is the first block without a hash; what is behind it is computed again."""
    assert tail_of("r", 34, 4, 16) == KvTail("r", 16, 32)


def test_a_tail_comes_back_once() -> None:
    """It is loaded into the block behind the full ones, and its slot is free when that is done."""
    desk = Desk()
    desk.keep("r", 37, block_id=7)
    work = desk.step()
    assert [copy.block_id for copy in work.store] == [7]
    desk.answer(work)
    assert desk.resume("r", present=32, tokens=38) == 5
    work = desk.step()
    assert [(copy.block_id, copy.slot) for copy in work.load] == [(102, 0)]
    assert desk.taken == 1
    desk.answer(work)
    assert (desk.taken, desk.tails.stored, desk.tails.loaded) == (0, 1, 1)
    assert desk.tails.match("r", 32, 38) == 0


@pytest.mark.parametrize(("present", "tokens"), [(16, 38), (48, 50), (32, 33)])
def test_a_tail_that_does_not_follow_on_is_given_up(present: int, tokens: int) -> None:
    """Blocks before it are missing, others have brought all of its tokens, or none of its tokens is needed: the request
    goes on without it, and what it computes from there has other tails."""
    desk = Desk()
    desk.stored("r", 37)
    assert desk.resume("r", present, tokens) == 0
    assert not desk.step().load
    assert desk.taken == 0


def test_the_newest_token_is_never_loaded() -> None:
    """Of a tail that has it, because the tokens of a step were dropped, the others are loaded."""
    desk = Desk()
    desk.stored("r", 37)
    assert desk.resume("r", present=32, tokens=37) == 4


def test_a_new_generation_replaces_the_old_one() -> None:
    """The bytes of an older one can be found by nobody; its slot is free."""
    desk = Desk()
    desk.stored("r", 35)
    desk.keep("r", 37)
    work = desk.step()
    assert (len(work.store), work.release) == (1, [])  # in the slot of the old one
    desk.answer(work)
    assert desk.taken == 1
    assert desk.resume("r", present=32, tokens=38) == 5


def test_a_tail_is_found_in_the_step_that_stores_it() -> None:
    """Workers load after they store. Where the store fails so does the load, and the tail is given up."""
    for lost in (False, True):
        desk = Desk()
        desk.keep("r", 37)
        assert desk.resume("r", present=32, tokens=38) == 5
        work = desk.step()
        assert [copy.slot for copy in work.store] == [copy.slot for copy in work.load]
        desk.answer(work, lost)
        assert (desk.taken, desk.tails.loaded) == (0, int(not lost))
        assert desk.traffic.buffer.counts.discarded == 0


def test_a_damaged_tail_is_given_up() -> None:
    """It was written whole, and is counted when it is not read whole."""
    desk = Desk()
    desk.stored("r", 37)
    desk.resume("r", present=32, tokens=38)
    desk.answer(desk.step(), lost=True)
    assert (desk.taken, desk.tails.loaded, desk.traffic.buffer.counts.discarded) == (0, 0, 1)


def test_a_request_that_ends_leaves_nothing() -> None:
    """Whether its tail is being stored, stored or being loaded: the slot is free when no copy uses it."""
    desk = Desk()
    desk.keep("r", 37)
    work = desk.step()
    desk.tails.forget("r")
    desk.keep("r", 37)  # another request of that name, so soon: it goes without
    assert desk.tails.match("r", 32, 38) == 0
    desk.answer(work)
    assert desk.taken == 0
    desk.stored("s", 37)
    desk.resume("s", present=32, tokens=38)
    work = desk.step()
    desk.tails.forget("s")
    assert desk.taken == 1
    desk.answer(work)
    assert desk.taken == 0


def test_requests_do_not_share_tails() -> None:
    """Of the same number of tokens each has its own."""
    desk = Desk()
    desk.keep("r", 37, block_id=1)
    desk.keep("s", 37, block_id=2)
    work = desk.step()
    assert [copy.block_id for copy in work.store] == [1, 2]
    assert len({copy.key for copy in work.store}) == 2


def test_a_tail_of_few_tokens_is_left() -> None:
    """A store and a load cost six tokens of prefill here: what holds fewer is computed again, and counted."""
    desk = Desk(move_tokens=3.0)
    desk.keep("r", 32 + 5)
    assert (desk.taken, desk.traffic.break_even.decisions[Move.STORE].declined) == (0, 1)
    desk.keep("r", 32 + 7)
    assert desk.taken == 1


def test_a_load_that_has_become_dear_is_declined_once() -> None:
    """The tail is given up with that decision."""
    desk = Desk(move_tokens=1.0)
    desk.stored("r", 35)
    for _ in range(20):
        desk.traffic.break_even.observe_move(Move.LOAD, BLOCK_BYTES, 5.0)
    assert [desk.tails.match("r", 32, 36) for _ in range(3)] == [0, 0, 0]
    assert (desk.taken, desk.traffic.break_even.decisions[Move.LOAD].declined) == (0, 1)


def test_a_tail_gives_way_like_any_block() -> None:
    """In a full host buffer it is evicted by others, and its request goes on without it."""
    desk = Desk()
    desk.stored("r", 37)
    desk.traffic.store({bytes([at]) * 32: at for at in range(SLOTS)})
    assert desk.tails.match("r", 32, 38) == 0
    assert desk.taken == SLOTS
