"""The host buffer's index: states, eviction, sizes, conservation."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from memory_agent.errors import SettingsError
from memory_agent.host_buffer import HostBuffer
from memory_agent.vmm import ContractViolation


def keys(letters: str) -> list[bytes]:
    return [letter.encode() for letter in letters]


def filled(letters: str, slots: int | None = None) -> HostBuffer:
    """A buffer that has stored these blocks one after the other, the first least recently."""
    buffer = HostBuffer(slots or len(letters), slots or len(letters))
    for key in keys(letters):
        assert buffer.begin_store([key])
        buffer.finish_store([key])
    return buffer


def stored(buffer: HostBuffer, letters: str) -> str:
    return "".join(key.decode() for key in keys(letters) if buffer.match_prefix([key], again=True))


def test_a_block_is_found_from_the_end_of_its_store_on() -> None:
    """A block being written is not matched, a finished one is, an aborted one leaves its slot to others."""
    buffer = HostBuffer(3, 3)
    assert buffer.begin_store(keys("abc")) == [(b"a", 0), (b"b", 1), (b"c", 2)]
    assert buffer.match_prefix(keys("abc")) == 0
    buffer.finish_store(keys("ac"))
    assert buffer.match_prefix(keys("abc")) == 1
    buffer.abort_store(keys("b"))
    assert buffer.begin_store(keys("d")) == [(b"d", 1)]
    assert (buffer.counts.stores, buffer.counts.aborted) == (2, 1)
    buffer.check_conservation()


def test_a_block_can_be_loaded_from_the_step_on_that_stores_it() -> None:
    """Whoever asks for it finds a block that is being written, and may pin it. Where the write fails it is found no
    more, and its slot goes with the last pin."""
    buffer = filled("a", slots=3)
    buffer.begin_store(keys("bc"))
    assert (buffer.match_prefix(keys("abc")), buffer.match_prefix(keys("abc"), storing=True)) == (1, 3)
    assert buffer.pin(keys("bc")) == buffer.pin(keys("bc")) == [1, 2]
    buffer.finish_store(keys("b"))
    buffer.abort_store(keys("c"))
    assert buffer.match_prefix(keys("abc"), storing=True) == 2
    buffer.unpin(keys("bc"))
    assert (buffer.taken_slots, buffer.freed_slots()) == (3, [])
    buffer.unpin(keys("bc"))
    assert (stored(buffer, "abc"), buffer.freed_slots()) == ("ab", [2])
    buffer.check_conservation()


def test_a_dropped_block_leaves_when_no_copy_uses_it() -> None:
    """At once, with its last pin, or when its store ends; none of them counts as damaged or evicted."""
    buffer = filled("ab", slots=4)
    buffer.begin_store(keys("cd"))
    buffer.pin(keys("b"))
    buffer.drop(keys("abcdx"))
    assert buffer.match_prefix(keys("d"), storing=True) == 0
    assert buffer.freed_slots() == [0]
    buffer.finish_store(keys("c"))
    buffer.abort_store(keys("d"))
    assert buffer.freed_slots() == [2, 3]
    buffer.unpin(keys("b"))
    assert (buffer.taken_slots, buffer.freed_slots()) == (0, [1])
    assert (buffer.counts.discarded, buffer.counts.evictions) == (0, 0)


def test_a_match_counts_once_a_request() -> None:
    """Leading blocks are hits, the rest misses, and a repeated question changes no count."""
    buffer = filled("ab")
    assert buffer.match_prefix(keys("abxa")) == 2
    assert buffer.match_prefix(keys("abxa"), again=True) == 2
    assert (buffer.counts.hits, buffer.counts.misses) == (2, 2)


def test_the_least_recently_used_block_makes_room() -> None:
    """A store into a full buffer evicts what was not touched, loaded or stored for the longest time."""
    buffer = filled("abcd")
    buffer.touch(keys("a"))
    buffer.pin(keys("b"))
    buffer.unpin(keys("b"))
    buffer.begin_store(keys("ef"))
    assert stored(buffer, "abcd") == "ab"
    assert buffer.counts.evictions == 2


def test_the_end_of_a_prefix_goes_before_its_beginning() -> None:
    """Of blocks that were stored, touched or loaded together the last is evicted first."""
    for use in ("store", "touch", "load"):
        buffer = HostBuffer(3, 3)
        buffer.begin_store(keys("abc"))
        buffer.finish_store(keys("abc"))
        if use == "touch":
            buffer.touch(keys("abc"))
        if use == "load":
            buffer.pin(keys("abc"))
            buffer.unpin(keys("abc"))
        buffer.begin_store(keys("x"))
        assert stored(buffer, "abc") == "ab"


def test_a_store_never_evicts_its_own_prefix() -> None:
    """A long request stores as many of its blocks as fit beside those it has there already, from the first on."""
    buffer = filled("abcd")
    assert [key for key, _ in buffer.begin_store(keys("cdefgh"))] == keys("ef")
    assert stored(buffer, "abcd") == "cd"
    assert buffer.begin_store(keys("cdefgh")) == []


def test_what_is_loaded_keeps_its_slot() -> None:
    """A block pinned twice survives stores and a shrink to nothing until the second unpin; then its slot is freed."""
    buffer = filled("ab")
    assert buffer.pin(keys("a")) == buffer.pin(keys("a")) == [0]
    assert buffer.begin_store(keys("cd")) == [(b"c", 1)]
    buffer.abort_store(keys("c"))
    buffer.set_logical_slots(0)
    buffer.unpin(keys("a"))
    assert (stored(buffer, "a"), buffer.freed_slots()) == ("a", [1])
    buffer.unpin(keys("a"))
    assert (stored(buffer, "a"), buffer.freed_slots()) == ("", [0])


def test_a_smaller_size_frees_slots_to_release() -> None:
    """Shrinking evicts down to the size and names each slot once; a store that was under way leaves when it is done."""
    buffer = filled("abcd", slots=6)
    buffer.begin_store(keys("e"))
    buffer.set_logical_slots(2)
    assert (stored(buffer, "abcd"), buffer.freed_slots(), buffer.freed_slots()) == ("d", [0, 1, 2], [])
    buffer.set_logical_slots(0)
    assert (buffer.taken_slots, buffer.freed_slots()) == (1, [3])
    assert buffer.begin_store(keys("f")) == []
    buffer.finish_store(keys("e"))
    assert (buffer.taken_slots, buffer.freed_slots()) == (0, [4])
    buffer.check_conservation()


def test_a_slot_that_is_taken_again_is_not_released() -> None:
    """A freed slot that a store has taken before anybody asked is kept, memory and all, and used before clean ones."""
    buffer = filled("ab", slots=4)
    buffer.set_logical_slots(1)
    buffer.set_logical_slots(4)
    assert buffer.begin_store(keys("c")) == [(b"c", 0)]
    assert buffer.freed_slots() == []


def test_a_damaged_block_is_forgotten() -> None:
    """A discarded block is not found again; one that others still load keeps its slot until they are done."""
    buffer = filled("abc")
    buffer.pin(keys("b"))
    buffer.discard(keys("abx"))
    buffer.discard(keys("b"))
    assert stored(buffer, "abc") == "c"
    with pytest.raises(ContractViolation, match="discarded"):
        buffer.pin(keys("b"))
    assert buffer.freed_slots() == [0]
    buffer.unpin(keys("b"))
    assert buffer.freed_slots() == [1]
    assert buffer.counts.discarded == 2
    assert [key for key, _ in buffer.begin_store(keys("b"))] == keys("b")


@pytest.mark.parametrize("size", [-1, 4])
def test_a_size_outside_the_ceiling_is_refused(size: int) -> None:
    """The logical size is 0 to the physical slots; nothing changes otherwise."""
    buffer = filled("abc")
    with pytest.raises(SettingsError, match="0 to 3"):
        buffer.set_logical_slots(size)
    assert stored(buffer, "abc") == "abc"


def test_a_buffer_without_slots_is_refused() -> None:
    """A buffer of no slots is a settings error."""
    with pytest.raises(SettingsError, match="at least one"):
        HostBuffer(0, 0)


def test_calls_in_the_wrong_state_change_nothing() -> None:
    """Finishing, aborting, pinning and unpinning blocks that are not in the state for it are contract violations."""
    buffer = filled("ab", slots=4)
    buffer.begin_store(keys("c"))
    for call, named in (
        (buffer.finish_store, "ca"),
        (buffer.finish_store, "cc"),
        (buffer.finish_store, "cx"),
        (buffer.abort_store, "cb"),
        (buffer.pin, "ax"),
        (buffer.pin, "aa"),
        (buffer.unpin, "a"),
        (buffer.unpin, "c"),
    ):
        with pytest.raises(ContractViolation):
            call(keys(named))
    buffer.check_conservation()
    buffer.set_logical_slots(0)
    assert (buffer.taken_slots, buffer.counts.stores, buffer.counts.aborted) == (1, 2, 0)


def test_conservation_notices_a_lost_slot() -> None:
    """A slot that nobody has any more is found by the check."""
    buffer = filled("ab", slots=4)
    buffer._clean.pop()
    with pytest.raises(ContractViolation, match="lost or used twice"):
        buffer.check_conservation()


class NaiveBuffer:
    """The same rules over plain lists, searched from end to end: what HostBuffer must agree with."""

    def __init__(self, logical: int) -> None:
        self.logical = logical
        self.storing: list[bytes] = []
        self.stored: list[bytes] = []  # least recently used first
        self.pins: list[bytes] = []
        self.lost: set[bytes] = set()

    def use(self, used: list[bytes]) -> None:
        for key in reversed(used):
            if key in self.stored and key not in self.pins:
                self.stored.remove(key)
                self.stored.append(key)

    def evict(self, spared: list[bytes]) -> bool:
        for key in self.stored:
            if key not in self.pins and key not in spared:
                self.stored.remove(key)
                return True
        return False

    def settle(self) -> None:
        for key in [key for key in self.lost if key in self.stored and key not in self.pins]:
            self.lost.remove(key)
            self.stored.remove(key)
        while len(self.storing) + len(self.stored) > self.logical and self.evict([]):
            pass

    def begin(self, wanted: list[bytes]) -> list[bytes]:
        self.use(wanted)
        begun: list[bytes] = []
        for key in wanted:
            if key in self.storing or key in self.stored:
                continue
            if len(self.storing) + len(self.stored) >= self.logical and not self.evict(wanted):
                return begun
            self.storing.append(key)
            begun.append(key)
        return begun


KEYS = [bytes([number]) for number in range(12)]
some_keys = st.lists(st.sampled_from(KEYS), max_size=6, unique=True)
SLOTS = 6


class HostBufferMachine(RuleBasedStateMachine):
    """Random operations, against the naive model and against workers that hold bytes in slots."""

    @initialize(logical=st.integers(0, SLOTS))
    def start(self, logical: int) -> None:
        self.buffer, self.model = HostBuffer(SLOTS, logical), NaiveBuffer(logical)
        self.slot_of: dict[bytes, int] = {}
        self.with_bytes: set[int] = set()

    @rule(wanted=st.lists(st.sampled_from(KEYS), max_size=8))
    def begin_store(self, wanted: list[bytes]) -> None:
        """Keys may repeat. No slot that is read or written is handed out before its copy has ended."""
        begun = self.buffer.begin_store(wanted)
        assert [key for key, _ in begun] == self.model.begin(wanted)
        busy = {self.slot_of[key] for key in [*self.model.storing, *self.model.pins] if key not in dict(begun)}
        for key, slot in begun:
            assert slot not in busy
            busy.add(slot)
            self.slot_of[key] = slot
            self.with_bytes.add(slot)

    @rule(chosen=some_keys)
    def finish_store(self, chosen: list[bytes]) -> None:
        done = [key for key in chosen if key in self.model.storing]
        self.buffer.finish_store(done)
        for key in reversed(done):
            self.model.storing.remove(key)
            self.model.stored.append(key)
        self.model.settle()

    @rule(chosen=some_keys)
    def abort_store(self, chosen: list[bytes]) -> None:
        gone = [key for key in chosen if key in self.model.storing]
        self.buffer.abort_store(gone)
        for key in gone:
            self.model.storing.remove(key)
            self.model.stored.append(key)
            self.model.lost.add(key)
        self.model.settle()

    @rule(chosen=some_keys)
    def pin(self, chosen: list[bytes]) -> None:
        """The slots are those that the blocks were, or are being, written to."""
        there = [*self.model.stored, *self.model.storing]
        found = [key for key in chosen if key in there and key not in self.model.lost]
        assert self.buffer.pin(found) == [self.slot_of[key] for key in found]
        self.model.pins += found

    @rule(chosen=some_keys)
    def unpin(self, chosen: list[bytes]) -> None:
        pinned = [key for key in chosen if key in self.model.pins and key in self.model.stored]
        self.buffer.unpin(pinned)
        for key in pinned:
            self.model.pins.remove(key)
        self.model.use(pinned)
        self.model.settle()

    @rule(chosen=some_keys)
    def touch(self, chosen: list[bytes]) -> None:
        self.buffer.touch(chosen)
        self.model.use(chosen)

    @rule(chosen=some_keys)
    def discard(self, chosen: list[bytes]) -> None:
        self.buffer.discard(chosen)
        self.model.lost |= {key for key in chosen if key in self.model.stored}
        self.model.settle()

    @rule(chosen=some_keys)
    def drop(self, chosen: list[bytes]) -> None:
        self.buffer.drop(chosen)
        self.model.lost |= {key for key in chosen if key in self.model.stored or key in self.model.storing}
        self.model.settle()

    @rule(logical=st.integers(0, SLOTS))
    def set_logical_slots(self, logical: int) -> None:
        self.buffer.set_logical_slots(logical)
        self.model.logical = logical
        self.model.settle()

    @rule()
    def release(self) -> None:
        """After a release the workers hold bytes in exactly the slots that are taken."""
        freed = self.buffer.freed_slots()
        taken = {self.slot_of[key] for key in [*self.model.storing, *self.model.stored]}
        assert taken.isdisjoint(freed)
        self.with_bytes -= set(freed)
        assert self.with_bytes == taken

    @rule(chosen=st.lists(st.sampled_from(KEYS), max_size=6))
    def match(self, chosen: list[bytes]) -> None:
        """Leading stored blocks, whatever else changes."""
        found = [key in self.model.stored and key not in self.model.lost for key in chosen]
        assert self.buffer.match_prefix(chosen) == (found.index(False) if False in found else len(found))

    @invariant()
    def agrees(self) -> None:
        self.buffer.check_conservation()
        for key in KEYS:
            whole = key in self.model.stored and key not in self.model.lost
            there = whole or (key in self.model.storing and key not in self.model.lost)
            assert self.buffer.match_prefix([key], again=True) == whole
            assert self.buffer.match_prefix([key], again=True, storing=True) == there
        assert self.buffer.taken_slots == len(self.model.storing) + len(self.model.stored)


TestHostBufferMachine = HostBufferMachine.TestCase
TestHostBufferMachine.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
