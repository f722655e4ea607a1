"""Who enters, who waits, who is refused."""

import itertools
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cluster.admission import AdmissionQueue, QueueLimits, Ticket, Verdict
from cluster.config import SloClass

CHAT = SloClass(name="chat", ttft_ms=1000.0, weight=4.0)
BATCH = SloClass(name="batch", ttft_ms=60_000.0, weight=1.0, sheddable=False)
numbers = itertools.count()


def ticket(name: str = "batch", tenant: str = "t", tokens: int = 100, due_s: float = 1e9, **other: float) -> Ticket:
    return Ticket(next(numbers), name, tenant, tokens, 0.0, due_s, **other)


def queue(*tickets: Ticket, limits: QueueLimits | None = None) -> AdmissionQueue:
    made = AdmissionQueue([CHAT, BATCH], limits)
    for one in tickets:
        assert made.offer(one, 0.0, room=False).verdict is Verdict.QUEUED
    return made


def order(made: AdmissionQueue) -> list[Ticket]:
    return [made.take(0.0) for _ in range(made.requests)]


def test_room_admits_unless_somebody_waits() -> None:
    """With room and no queue a request enters; behind others it waits though there is room."""
    made = AdmissionQueue([CHAT, BATCH])
    assert made.offer(ticket(), 0.0, room=True).verdict is Verdict.ADMITTED
    assert made.offer(ticket(), 0.0, room=False).verdict is Verdict.QUEUED
    assert made.offer(ticket(), 0.0, room=True).verdict is Verdict.QUEUED


def test_the_earliest_deadline_goes_first_within_a_tenant() -> None:
    """Order of coming does not matter inside a class's tenant."""
    late, early, middle = ticket(due_s=30.0), ticket(due_s=10.0), ticket(due_s=20.0)
    assert order(queue(late, early, middle)) == [early, middle, late]


def test_tenants_of_a_class_take_turns_by_tokens() -> None:
    """One with a hundred requests does not hold up one with three, and a large request counts for more."""
    crowd = [ticket(tenant="crowd", due_s=1.0) for _ in range(100)]
    few = [ticket(tenant="few", due_s=5.0) for _ in range(3)]
    first = order(queue(*crowd, *few))[:6]
    assert Counter(one.tenant for one in first) == {"crowd": 3, "few": 3}
    large = [ticket(tenant="large", tokens=300) for _ in range(10)]
    small = [ticket(tenant="small", tokens=100) for _ in range(30)]
    served = order(queue(*large, *small))[:20]
    assert Counter(one.tenant for one in served)["small"] == 15


def test_classes_share_by_weight_and_none_starves() -> None:
    """Four to one in tokens, as their weights say, though the deadlines of one are all earlier."""
    chat = [ticket("chat", due_s=2e9) for _ in range(200)]
    batch = [ticket("batch", due_s=1.0) for _ in range(200)]
    made = AdmissionQueue([CHAT.model_copy(update={"sheddable": False}), BATCH])
    for one in [*batch, *chat]:
        made.offer(one, 0.0, room=False)
    served = Counter(one.slo_class for one in order(made)[:50])
    assert served == {"chat": 40, "batch": 10}


def test_nothing_is_saved_up_by_being_away() -> None:
    """A class that comes late does not get what it did not ask for before."""
    made = AdmissionQueue([SloClass(name="a", sheddable=False), SloClass(name="b", sheddable=False)])
    for _ in range(100):
        made.offer(ticket("a"), 0.0, room=False)
    for _ in range(50):
        made.take(0.0)
    for _ in range(50):
        made.offer(ticket("b"), 0.0, room=False)
    assert Counter(one.slo_class for one in order(made)[:20]) == {"a": 10, "b": 10}


def test_a_full_queue_refuses_by_requests_and_by_tokens() -> None:
    """Both bounds hold, and the answer says how full it is and when to come back."""
    for limits in (QueueLimits(requests=2), QueueLimits(tokens=250)):
        made = queue(ticket(), ticket(), limits=limits)
        decision = made.offer(ticket(), 0.0, room=False)
        assert decision.verdict is Verdict.REFUSED and "2 requests of 200 tokens" in decision.reason
        assert decision.retry_after_s >= 1


def test_a_request_that_would_be_late_is_refused_only_where_it_may_be() -> None:
    """A sheddable class is refused when its target cannot be met, another one waits all the same."""
    made = AdmissionQueue([CHAT, BATCH])
    for _ in range(10):  # 100 tokens a second enter
        made.offer(ticket(), 0.0, room=True)
    for _ in range(20):
        made.offer(ticket(), 0.0, room=False)
    # Nobody of its class waits yet, so it is next in a moment.
    assert made.offer(ticket("chat", due_s=0.001), 0.0, room=False).verdict is Verdict.QUEUED
    assert made.offer(ticket("chat", due_s=0.5), 0.0, room=False).verdict is Verdict.REFUSED
    assert made.offer(ticket("batch", due_s=0.5), 0.0, room=False).verdict is Verdict.QUEUED


def test_retry_after_is_honest() -> None:
    """A refused request that comes back when it was told to, while others enter at the same rate, is not refused
    again."""
    made = AdmissionQueue([CHAT, BATCH])
    now_s = 0.0

    def offer(room: bool) -> Verdict:
        return made.offer(ticket("chat", due_s=now_s + 1.0), now_s, room).verdict

    for at in range(100):
        now_s = at / 10
        offer(room=True)
    while (decision := made.offer(ticket("chat", due_s=now_s + 1.0), now_s, False)).verdict is Verdict.QUEUED:
        pass
    back_s = now_s + decision.retry_after_s
    while now_s < back_s:  # ten a second enter, as before
        now_s += 0.1
        if made.requests:
            made.take(now_s)
    assert offer(room=False) is Verdict.QUEUED


def test_one_that_comes_back_when_told_would_be_in_time() -> None:
    """2,000 tokens at 100 a second are 20 s: with a target of 5 s and 1 s of its own, it should come in 16."""
    made = queue(*(ticket() for _ in range(20)))
    made.capacity = 100.0
    assert made.comeback_s(ticket(due_s=5.0, compute_s=1.0)) == 16.0
    assert made.comeback_s(ticket(due_s=60.0)) == 1.0


def test_a_known_capacity_keeps_a_burst_after_quiet_from_being_refused() -> None:
    """Few have entered lately because few came: what is known of the replicas counts where it is more."""
    made = AdmissionQueue([CHAT, BATCH])
    made.offer(ticket("chat"), 0.0, room=True)
    made.offer(ticket("chat", due_s=0.5), 0.0, room=False)
    assert made.offer(ticket("chat", due_s=0.5), 0.0, room=False).verdict is Verdict.REFUSED
    made.capacity = 1000.0
    assert made.offer(ticket("chat", due_s=0.5), 0.0, room=False).verdict is Verdict.QUEUED


def test_one_that_is_withdrawn_is_gone() -> None:
    """The others keep their order, and its tokens are nobody's any more."""
    late, gone, early = ticket(due_s=30.0), ticket(due_s=20.0, tokens=70), ticket(due_s=10.0)
    made = queue(late, gone, early)
    made.withdraw(gone)
    assert (made.requests, made.tokens) == (2, 200)
    assert order(made) == [early, late]


def test_late_ones_are_dropped_in_sheddable_classes() -> None:
    """Those whose first token would be late even if begun now leave the queue; a class that must not be shed stays."""
    chat = ticket("chat", due_s=5.0, compute_s=2.0)
    made = queue(chat, ticket("batch", due_s=5.0, compute_s=2.0))
    assert made.drop_late(2.9) == []
    assert made.drop_late(3.1) == [chat]
    assert (made.requests, made.tokens) == (1, 100)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["chat", "batch", "?"]),
            st.sampled_from("abc"),
            st.integers(1, 900),
            st.sampled_from(["wait", "take", "withdraw"]),
        ),
        max_size=60,
    )
)
def test_every_request_that_is_queued_comes_out_once(offers: list[tuple[str, str, int, str]]) -> None:
    """Whatever comes and goes, counts are right at every moment, and what was queued leaves once."""
    made = AdmissionQueue([CHAT, BATCH])
    queued, left = dict[int, Ticket](), list[int]()
    for at, (name, tenant, tokens, then) in enumerate(offers):
        one = ticket(name, tenant, tokens)
        if made.offer(one, at / 10, room=False).verdict is Verdict.QUEUED:
            queued[one.number] = one
        if then == "take" and made.requests:
            left.append(made.take(at / 10).number)
        elif then == "withdraw" and made.requests:
            left.append(next(number for number in queued if number not in left))
            made.withdraw(queued[left[-1]])
        assert made.requests == len(queued) - len(left)
    left += [one.number for one in order(made)]
    assert sorted(left) == sorted(queued)
    assert (made.tokens, made.peek()) == (0, None)
