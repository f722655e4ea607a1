"""The door of a model: who enters, who waits, who leaves; and that it is worth having."""

import asyncio
from collections.abc import Sequence
from http import HTTPStatus

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.admission import AdmissionQueue, QueueLimits, Verdict
from cluster.bench.report import Slo
from cluster.config import AdmissionConfig, SloClass
from cluster.door import Door, open_door
from cluster.request_slo import Part, RequestSlo, Stop
from cluster.room import Room
from cluster.simulator.arrivals import Synthetic, labelled, synthetic_arrivals
from cluster.slo import Ending, SloAccount, class_targets
from replicas.engine_profile import load_profile
from tests.unit.cluster.played_cluster import PlayedCluster
from tests.unit.cluster.virtual_loop import run_virtually

CHAT = SloClass(name="chat", ttft_ms=2000.0)
BATCH = SloClass(name="batch", ttft_ms=60_000.0, sheddable=False)
HALT = Stop(Ending.TIMED_OUT, HTTPStatus.GATEWAY_TIMEOUT, "too long")


def door(places: int = 1, limits: QueueLimits | None = None) -> Door:
    """Over one replica that runs ``places`` requests, on this loop's clock."""
    queue = AdmissionQueue([CHAT, BATCH], limits)
    return Door(queue, Room(0.5, places, replicas=1), asyncio.get_running_loop().time)


class Visitor:
    """A request with ``parts`` engine requests at the door, each in a task of its own, as the core has them."""

    def __init__(self, at: Door, parts: int = 1, slo_class: SloClass = BATCH, tenant: str = "") -> None:
        now_s = asyncio.get_running_loop().time()
        self.door = at
        self.request = RequestSlo(slo_class, class_targets(slo_class), now_s, tenant)
        self.tasks: list[asyncio.Task[bool]] = []
        for number in range(parts):
            self.request.add(Part(10, lambda number=number: self.drop(number)))  # type: ignore[misc]
            self.tasks.append(asyncio.create_task(at.enter(self.request.parts[number])))

    @property
    def inside(self) -> list[bool]:
        return [part.sent and not part.over for part in self.request.parts]

    def end(self) -> None:
        """All parts get a token and are done."""
        for part in self.request.parts:
            self.door.began(part, "r")
            self.door.ended(part)

    def leave(self) -> None:
        """The client goes, as the core hears of it."""
        for number in range(len(self.tasks)):
            self.drop(number)

    def drop(self, number: int) -> None:
        """One of its parts is given up."""
        self.door.ended(self.request.parts[number])
        self.tasks[number].cancel()


async def turn() -> None:
    """Let every task that can run do so."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_place_that_is_free_goes_to_the_next() -> None:
    """One enters, the next waits until it has ended."""

    async def play() -> None:
        at = door()
        one, two = Visitor(at), Visitor(at)
        await turn()
        assert (one.inside, two.inside, at.waiting) == ([True], [False], 1)
        one.end()
        await turn()
        assert (two.inside, at.waiting, at.waiting_tokens) == ([True], 0, 0)
        assert two.tasks[0].result()

    run_virtually(play())


def test_without_a_queue_everybody_enters() -> None:
    """Admission that is off counts, and holds nobody back."""

    async def play() -> None:
        at = Door()
        visitors = [Visitor(at) for _ in range(50)]
        await turn()
        assert all(one.inside == [True] and one.request.admitted for one in visitors)
        assert at.room.inside == 50

    run_virtually(play())


def test_a_request_enters_with_all_its_parts() -> None:
    """Three answers take three places at once, and none of them goes ahead alone."""

    async def play() -> None:
        at = door(places=4)
        first, three, last = Visitor(at, parts=2), Visitor(at, parts=3), Visitor(at)
        await turn()
        assert (first.inside, three.inside, last.inside) == ([True] * 2, [False] * 3, [False])
        first.end()
        await turn()
        assert (three.inside, last.inside, at.room.inside) == ([True] * 3, [True], 4)

    run_virtually(play())


def test_a_part_that_comes_later_belongs_to_a_request_that_is_in() -> None:
    """It does not wait behind others, and counts inside."""

    async def play() -> None:
        at = door()
        one, other = Visitor(at), Visitor(at)
        await turn()
        late = Part(10, lambda: None)
        one.request.add(late)
        assert await at.enter(late)
        assert (at.room.inside, other.inside) == (2, [False])

    run_virtually(play())


def test_a_client_that_goes_leaves_the_queue_at_once() -> None:
    """Its place in the queue and its tokens are given back, whatever it had of parts, and nobody hears of it again."""

    async def play() -> None:
        at = door()
        one, gone, stays = Visitor(at), Visitor(at, parts=3), Visitor(at)
        await turn()
        tokens = at.waiting_tokens
        gone.leave()
        await turn()
        assert (at.waiting, at.waiting_tokens < tokens) == (1, True)
        one.end()
        await turn()
        assert (stays.inside, gone.inside) == ([True], [False] * 3)

    run_virtually(play())


def test_one_that_goes_in_the_moment_it_is_let_in_gives_its_place_back() -> None:
    """Between its turn and the run of its task a request may be cancelled: the next one gets the place."""

    async def play() -> None:
        at = door()
        one, two, three = Visitor(at), Visitor(at), Visitor(at)
        await turn()
        one.end()
        two.leave()
        await turn()
        assert (two.inside, three.inside, at.room.inside) == ([False], [True], 1)

    run_virtually(play())


def test_a_full_queue_refuses_with_whole_seconds() -> None:
    """The one too many is stopped with 429, and when it may come again."""

    async def play() -> None:
        at = door(limits=QueueLimits(requests=1))
        Visitor(at), Visitor(at)
        third = Visitor(at)
        await turn()
        halt = third.request.halt
        assert halt is not None and (halt.status, halt.ending) == (429, Ending.REJECTED)
        assert halt.retry_after_s is not None and halt.retry_after_s >= 1
        assert at.waiting == 1

    run_virtually(play())


def test_the_longer_nobody_enters_the_later_one_may_come_again() -> None:
    """A queue that stands still from the beginning tells nobody to come again in a second."""

    async def play() -> None:
        at = door(limits=QueueLimits(requests=5))
        for _ in range(6):
            Visitor(at)
        told = list[int]()
        for _ in range(3):
            await asyncio.sleep(20.0)
            refused = Visitor(at)
            await turn()
            assert refused.request.halt is not None and refused.request.halt.retry_after_s is not None
            told.append(refused.request.halt.retry_after_s)
        assert 10 < told[0] < told[1] < told[2]
        at.close()

    run_virtually(play())


def test_one_that_has_become_late_is_refused_while_it_waits() -> None:
    """A sheddable request that waited past its target leaves with 429, though nothing else happens; others wait on."""

    async def play() -> None:
        at = door()
        Visitor(at)
        late, patient = Visitor(at, slo_class=CHAT), Visitor(at)
        await asyncio.sleep(1.5)
        assert late.request.halt is None
        await asyncio.sleep(1.0)
        assert late.request.halt is not None and late.request.halt.status == 429
        assert patient.request.halt is None and at.waiting == 1
        at.close()

    run_virtually(play())


def test_the_door_counts_what_it_says() -> None:
    """Who is let in at once, has to wait, is let in then, is refused at once and while it waits, by class, and how long
    they have waited; one whose client goes has waited too, and hears nothing."""

    async def play() -> None:
        at = door(limits=QueueLimits(requests=2))
        first, patient, hurried = Visitor(at), Visitor(at), Visitor(at, slo_class=CHAT)
        await turn()
        too_many = Visitor(at)
        await turn()
        assert at.verdicts == {
            ("batch", Verdict.ADMITTED): 1,
            ("batch", Verdict.QUEUED): 1,
            ("chat", Verdict.QUEUED): 1,
            ("batch", Verdict.REFUSED): 1,
        }
        await asyncio.sleep(3.0)
        assert (at.verdicts["chat", Verdict.REFUSED], hurried.request.halt is not None) == (1, True)
        assert 2.0 <= at.waited_s["chat"] <= 2.2
        first.end()
        leaver = Visitor(at)
        await turn()
        assert at.verdicts["batch", Verdict.ADMITTED] == 2 and patient.inside == [True]
        assert at.waited_s["batch"] == pytest.approx(3.0)
        await asyncio.sleep(1.0)
        leaver.leave()
        await turn()
        assert at.waited_s["batch"] == pytest.approx(4.0)
        assert (at.verdicts["batch", Verdict.ADMITTED], at.verdicts["batch", Verdict.QUEUED]) == (2, 2)
        assert too_many.request.halt is not None

    run_virtually(play())


def test_a_request_that_was_ended_does_not_enter() -> None:
    """A deadline that passes in the queue takes it out; a part that comes after it is stopped at once."""

    async def play() -> None:
        at = door()
        one, two = Visitor(at), Visitor(at)
        await turn()
        two.request.stop(HALT)
        await turn()
        assert at.waiting == 0
        stopped = list[bool]()
        part = Part(10, lambda: stopped.append(True))
        two.request.add(part)
        assert stopped == [True] and not await at.enter(part)
        one.end()
        await turn()
        assert (two.inside, at.room.inside) == ([False, False], 0)

    run_virtually(play())


def test_tenants_take_turns() -> None:
    """One with many requests does not hold up another's single one."""

    async def play() -> None:
        at = door()
        first = Visitor(at)
        crowd = [Visitor(at, tenant="crowd") for _ in range(20)]
        await turn()
        single = Visitor(at, tenant="single")
        await turn()
        inside = [first]
        for _ in range(3):
            inside[-1].end()
            await turn()
            inside.append(next(one for one in [single, *crowd] if one.inside == [True]))
        assert single in inside

    run_virtually(play())


def test_replicas_that_come_let_the_waiting_in() -> None:
    """Without a replica everybody waits; the first poll that finds one opens the door."""

    async def play() -> None:
        at = door(places=2)
        at.replicas(0, 0)
        one, two, three = Visitor(at), Visitor(at), Visitor(at)
        await turn()
        assert at.waiting == 3
        at.replicas(1, 0)
        await turn()
        assert (one.inside, two.inside, three.inside) == ([True], [True], [False])
        at.close()

    run_virtually(play())


EVENTS = st.tuples(
    st.sampled_from(["come", "come", "come", "drop", "end", "leave", "halt", "wait", "replicas"]), st.integers(0, 20)
)


@settings(max_examples=200, deadline=None)
@given(st.lists(EVENTS, min_size=10, max_size=50))
def test_nobody_is_lost_whatever_happens(events: list[tuple[str, int]]) -> None:
    """Requests of several parts and classes come, end, lose a part, leave and time out in any order, while replicas
    come and go, and tokens arrive that nobody waits for any more: each is outside or inside with all parts that are
    not over, the counts say so, and when all have left nothing is left."""

    async def play() -> None:
        at = door(places=4, limits=QueueLimits(requests=6))
        visitors: list[Visitor] = []
        for event, number in events:
            one = visitors[number % len(visitors)] if visitors else None
            if event == "come":
                visitors.append(Visitor(at, 1 + number % 3, (BATCH, CHAT)[number % 2], "abc"[number % 3]))
            elif event == "wait":
                await asyncio.sleep(number / 10)
            elif event == "replicas":
                at.replicas(number % 3, 0)
            elif one is not None and event == "halt":
                one.request.stop(HALT)
            elif one is not None and event == "leave":
                one.leave()
            elif one is not None and event == "drop":
                one.drop(0)
            elif one is not None and (any(one.inside) or all(part.over for part in one.request.parts)):
                one.end()
            await turn()
            inside = [sum(one.inside) for one in visitors]
            left = [sum(not part.over for part in one.request.parts) for one in visitors]
            waiting = sum(not task.done() for one in visitors for task in one.tasks)
            assert all(count in (0, most) for count, most in zip(inside, left, strict=True))
            assert all(one.request.admitted for one in visitors if any(one.inside))
            assert (at.room.inside, at.waiting) == (sum(inside), waiting)
            assert (at.waiting_tokens > 0) == (waiting > 0)
        for one in visitors:
            one.leave()
        await turn()
        assert (at.waiting, at.waiting_tokens, at.room.inside, at.room.pending) == (0, 0, 0, 0)
        at.close()

    run_virtually(play())


def test_what_is_counted_of_several_parts() -> None:
    """Two answers begin with the first token of either, come as slowly as the slower one, and end with the later one;
    one without a token is a miss."""
    request = RequestSlo(CHAT, Slo(2000.0), 10.0)
    request.add(Part(5, lambda: None, first_s=10.5, last_s=11.5, tokens=11, replica="a"))
    request.add(Part(5, lambda: None, first_s=11.0, last_s=13.0, tokens=3, replica="b"))
    outcome = request.outcome("m", Ending.ANSWERED)
    assert (outcome.ttft_s, outcome.tpot_s, outcome.latency_s, outcome.output_tokens) == (0.5, 1.0, 3.0, 14)
    nothing = RequestSlo(CHAT, Slo(2000.0), 10.0, parts=[Part(5, lambda: None)])
    assert not nothing.outcome("m", Ending.ANSWERED).kept


PROFILE = load_profile("llama-3.1-8b-h100")
INTERACTIVE = SloClass(name="interactive", ttft_ms=500.0, tpot_ms=40.0, weight=10.0)
OVERNIGHT = SloClass(name="overnight", ttft_ms=20_000.0, tpot_ms=100.0)


def fares(classes: Sequence[SloClass], factor: int, seqs: int, enabled: bool = True) -> tuple[SloAccount, float]:
    """How requests of both classes fare at so many times the load that two replicas can hold, and over which seconds
    these came."""
    shape = Synthetic(requests=900 * factor, rate=30.0 * factor, prompt_tokens=1000)
    come = synthetic_arrivals(shape, 3, PROFILE.max_model_len)
    come = labelled(come, {"interactive": 0.3, "overnight": 0.7}, tenants=3, seed=3)

    async def play() -> SloAccount:
        clock = asyncio.get_running_loop().time
        at = open_door(classes, AdmissionConfig(enabled=enabled), seqs, replicas=2, ingresses=1, clock=clock)
        played = PlayedCluster(msgspec.structs.replace(PROFILE, max_num_seqs=seqs), 2, at, classes)
        await played.serve(come)
        assert (at.waiting, at.waiting_tokens, at.room.inside) == (0, 0, 0)
        at.close()
        return played.account

    return run_virtually(play()), come[-1].at_s


@pytest.mark.parametrize("seqs", [48, 256])
@pytest.mark.parametrize("sheddable", [True, False])
def test_interactive_goodput_survives_overload(seqs: int, sheddable: bool) -> None:
    """At three times the load interactive goodput is at least nine tenths of that at capacity, whether the engines'
    places or their TPOT is what is short; the other class is not starved, and loses nobody where it must not."""
    classes = [INTERACTIVE, OVERNIGHT.model_copy(update={"sheddable": sheddable})]
    goodput = {}
    for factor in (1, 3):
        account, seconds = fares(classes, factor, seqs)
        goodput[factor] = account.by_class["interactive"].kept / seconds
        other = account.by_class["overnight"]
        assert other.endings[Ending.ANSWERED] >= 0.25 * other.counted
        assert sheddable or other.endings[Ending.ANSWERED] == other.counted
    assert goodput[3] >= 0.9 * goodput[1]


def test_one_class_that_may_wait_is_not_held_back_for_its_tpot() -> None:
    """Nobody is refused, so holding some back would only make them later: as many enter as the engines run, though
    their TPOT is too long; with a second class, or where they may be refused, fewer do."""

    async def limit(classes: Sequence[SloClass]) -> int:
        clock = asyncio.get_running_loop().time
        at = open_door(classes, AdmissionConfig(), seqs=4, replicas=2, ingresses=1, clock=clock)
        visitors = [Visitor(at, slo_class=classes[0]) for _ in range(8)]
        await turn()
        for one in visitors:
            at.began(one.request.parts[0], "r")
        for second in range(1, 6):
            await asyncio.sleep(1.0)
            for one in visitors:
                one.request.parts[0].tokens = second  # a second each
            at.replicas(2, 8)
        return at.room.limit

    patient = CHAT.model_copy(update={"sheddable": False})
    assert run_virtually(limit([patient])) == 8
    assert run_virtually(limit([CHAT])) < 8
    assert run_virtually(limit([patient, BATCH])) < 8


def test_a_stuck_replica_does_not_close_the_door() -> None:
    """With one of two replicas a thousand times slower, the other one still gives at least two thirds of the answers
    that it gives alone, though nobody tells the door which one it is."""
    shape = Synthetic(requests=600, rate=20.0, prompt_tokens=1000)
    come = labelled(synthetic_arrivals(shape, 5, PROFILE.max_model_len), {"overnight": 1.0}, tenants=1, seed=5)

    def answered(replicas: int, slowness: float) -> int:
        async def play() -> int:
            loop = asyncio.get_running_loop()
            at = open_door([OVERNIGHT], AdmissionConfig(), 32, replicas, ingresses=1, clock=loop.time)
            played = PlayedCluster(msgspec.structs.replace(PROFILE, max_num_seqs=32), replicas, at, [OVERNIGHT])
            played.slow_down(slowness)
            serving = asyncio.ensure_future(played.serve(come))
            await asyncio.sleep(come[-1].at_s)
            serving.cancel()
            at.close()
            return played.account.total.endings[Ending.ANSWERED]

        return run_virtually(play())

    assert answered(2, slowness=1000.0) >= 2 / 3 * answered(1, slowness=1.0)


def test_without_admission_the_same_overload_ruins_it() -> None:
    """What the test above would see if the door did nothing."""
    goodput = {}
    for factor, enabled in ((1, True), (3, False)):
        account, seconds = fares([INTERACTIVE, OVERNIGHT], factor, 48, enabled)
        goodput[factor] = account.by_class["interactive"].kept / seconds
    assert goodput[3] < 0.5 * goodput[1]
