"""What a replica remembers of answers: whole, for its time, within its bounds, and for who may have it."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.engine import EngineCoreOutput, FinishReason

from replicas.answer_journal import KEPT_S, AnswerJournal, Entry, Found, Mark

KEY, ASKED = b"key", b"asked"


class Taker:
    """Takes what comes. gone: what was asked of it."""

    def __init__(self) -> None:
        self.ended: Any = asyncio.Future(loop=asyncio.new_event_loop())
        self.lost = False
        self.gone = False
        self.took: list[int] = []

    def put(self, output: EngineCoreOutput) -> None:
        self.took += output.new_token_ids

    def give_up(self) -> None:
        self.gone = True


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def output(*tokens: int, reason: FinishReason | None = None) -> EngineCoreOutput:
    return EngineCoreOutput("r", list(tokens), finish_reason=reason, stop_reason=None if reason is None else 7)


@pytest.fixture
def taker() -> Iterator[Taker]:
    made = Taker()
    yield made
    made.ended.get_loop().close()


def test_what_the_engine_gives_is_remembered_and_goes_on(taker: Taker) -> None:
    """Tokens of attempts before, then those of this one, while it runs and after its end; its taker gets each."""
    journal = AnswerJournal("a")
    with journal.recorded(Mark(KEY, ASKED, [1, 2]), taker) as outlet:
        outlet.put(output(3))
        assert journal.find(KEY, ASKED) == Found("a", ASKED, [1, 2, 3], live=True)
        outlet.put(output(4, 5, reason=FinishReason.STOP))
        assert outlet.ended is taker.ended
    assert taker.took == [3, 4, 5]
    assert journal.find(KEY, ASKED) == Found("a", ASKED, [1, 2, 3, 4, 5], False, FinishReason.STOP, 7)
    assert journal.find(b"another", ASKED) is None


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR])
def test_what_was_broken_off_is_not_whole(taker: Taker, reason: FinishReason) -> None:
    """An abort, an error or a request that moved away leave a beginning."""
    journal = AnswerJournal("a")
    with pytest.raises(ConnectionError), journal.recorded(Mark(KEY, ASKED), taker) as outlet:
        outlet.put(output(3, reason=reason))
        raise ConnectionError
    assert journal.find(KEY, ASKED) == Found("a", ASKED, [3])


def test_without_a_key_nothing_is_remembered(taker: Taker) -> None:
    """The outputs go straight to who takes them."""
    journal = AnswerJournal("a")
    with journal.recorded(None, taker) as outlet:
        assert outlet is taker
    assert len(journal) == 0


def test_whoever_asks_takes_over_from_one_that_is_lost(taker: Taker) -> None:
    """The attempt ends, and what its engine still gives is in no answer; asking something else ends nothing."""
    journal = AnswerJournal("a")
    with journal.recorded(Mark(KEY, ASKED), taker) as outlet:
        outlet.put(output(3))
        taker.lost = True
        assert journal.find(KEY, b"something else") == Found("a", ASKED, [3])
        assert not taker.gone
        assert journal.find(KEY, ASKED) == Found("a", ASKED, [3])
        assert taker.gone
        outlet.put(output(4))
    assert journal.find(KEY, ASKED) == Found("a", ASKED, [3])


def test_a_new_attempt_takes_the_place_of_the_old_one(taker: Taker) -> None:
    """Also while the old one has not noticed: nothing of it is mixed into the new one."""
    journal = AnswerJournal("a")
    with journal.recorded(Mark(KEY, ASKED), taker) as old:
        old.put(output(3))
        with journal.recorded(Mark(KEY, ASKED, [3]), taker) as new:
            old.put(output(9))
            new.put(output(4))
        old.put(output(9))
    assert journal.find(KEY, ASKED) == Found("a", ASKED, [3, 4])
    assert journal.tokens == 2


def test_it_is_kept_for_some_minutes_after_its_end(taker: Taker) -> None:
    """Not counted from its begin: one that runs for an hour is there."""
    clock = Clock()
    journal = AnswerJournal("a", clock)
    with journal.recorded(Mark(KEY, ASKED), taker) as outlet:
        outlet.put(output(3))
        clock.now_s += 3600
        assert journal.find(KEY, ASKED) is not None
    clock.now_s += KEPT_S - 1
    assert journal.find(KEY, ASKED) is not None
    clock.now_s += 1
    assert journal.find(KEY, ASKED) is None
    assert (len(journal), journal.tokens) == (0, 0)


def test_the_oldest_that_has_ended_goes_first(taker: Taker) -> None:
    """Before any that runs; of these again the oldest."""
    journal = AnswerJournal("a", most_tokens=4)
    first = journal.begin(Mark(b"1", ASKED, [1]), taker)
    for key in (b"2", b"3"):
        journal.end(journal.begin(Mark(key, ASKED, [1]), taker))
    journal.write(first, output(5, 6))
    assert [journal.find(key, ASKED) is not None for key in (b"1", b"2", b"3")] == [True, False, True]
    journal.begin(Mark(b"4", ASKED, [1, 2]), taker)
    assert [journal.find(key, ASKED) is not None for key in (b"1", b"3", b"4")] == [False, False, True]
    journal.write(first, output(7))
    assert (len(journal), journal.tokens) == (1, 2)


actions = st.one_of(
    st.tuples(st.just("begin"), st.integers(0, 7), st.integers(0, 9)),
    st.tuples(st.just("write"), st.integers(0, 30), st.integers(0, 9)),
    st.tuples(st.just("end"), st.integers(0, 30), st.just(0)),
    st.tuples(st.just("wait"), st.integers(0, 400), st.just(0)),
    st.tuples(st.just("find"), st.integers(0, 7), st.just(0)),
)


@given(st.lists(actions, max_size=60), st.integers(1, 5), st.integers(0, 20))
def test_the_bounds_hold_whatever_comes(steps: list[tuple[str, int, int]], entries: int, tokens: int) -> None:
    """Never more entries or tokens than allowed, the count of tokens is theirs, and what is found is what was written
    for that key last, from its begin on."""
    clock, taker = Clock(), Taker()
    journal = AnswerJournal("a", clock, entries, tokens)
    begun: list[Entry] = []
    written: dict[int, list[int]] = {}
    last: dict[bytes, int] = {}
    for what, which, count in steps:
        entry = begun[which % len(begun)] if begun else None
        if what == "begin":
            begun.append(journal.begin(Mark(bytes([which]), ASKED, [0] * count), taker))
            last[bytes([which])], written[len(begun) - 1] = len(begun) - 1, [0] * count
        elif what == "write" and entry is not None:
            if entry.runs:
                written[which % len(begun)] += [which] * count
            journal.write(entry, output(*[which] * count))
        elif what == "end" and entry is not None:
            journal.end(entry)
        elif what == "wait":
            clock.now_s += which
        found = {key: journal.find(key, ASKED) for key in last}
        assert len(journal) <= entries
        assert journal.tokens <= tokens
        assert journal.tokens == sum(len(one.token_ids) for one in found.values() if one is not None)
        assert len(journal) == sum(one is not None for one in found.values())
        for key, one in found.items():
            assert one is None or one.token_ids == written[last[key]]
    taker.ended.get_loop().close()
