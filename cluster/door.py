"""The door of one model in one ingress process: its queue in front of the replicas, and who is inside.

    enter --> queue decides: admitted | waits | refused --> sent --> began --> ended
                                 |   ^                                  |        |
                                 |   +--- let in, while there is room <-+--------+
                                 +------> refused: too late               replicas: how many there are

An HTTP request enters as a whole: with all of its parts that there are when the first one comes to the door, which are
all, since the core brings each there in a task of its own that runs a turn of the event loop later. A part that
comes afterwards, such as a further turn of a conversation with tools, belongs to a request that is in.
"""

import asyncio
import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from math import inf

from cluster.admission import AdmissionQueue, QueueLimits, Ticket, Verdict
from cluster.busy_rate import BusyRate
from cluster.config import AdmissionConfig, SloClass
from cluster.request_slo import Part, RequestSlo, Stop
from cluster.room import Room
from cluster.slo import Ending

ROOM_SHARE = 0.25
"""Of the tightest TTFT target that a request may wait in an engine: longer it waits at the door."""
TICK_S = 0.1
"""While requests wait, those that are too late are looked for at least so often."""
_ANSWER_TOKENS = 128.0
_ANSWER_MEMORY = 0.99


@dataclass(eq=False)
class _Wait:
    """A request that waits. parts: of it that do."""

    request: RequestSlo
    ticket: Ticket
    since_s: float
    over: asyncio.Event = field(default_factory=asyncio.Event)
    parts: int = 0


class Door:
    """Belongs to the event loop of its ingress. Without a queue everybody enters at once.

    Attributes:
        waiting: engine requests that wait here.
        verdicts: HTTP requests by class and what the door said to them; one that had to wait is let in or refused
            afterwards. waited_s: by class, of those that wait no more.
        room: who is inside.
    """

    def __init__(
        self,
        queue: AdmissionQueue | None = None,
        room: Room | None = None,
        clock: Callable[[], float] = time.monotonic,
        keeps_pace: bool = True,
    ) -> None:
        """keeps_pace: requests are held back where the TPOT of those inside would suffer."""
        self.waiting = 0
        self.verdicts: Counter[tuple[str, Verdict]] = Counter()
        self.waited_s: defaultdict[str, float] = defaultdict(float)
        self._keeps_pace = keeps_pace
        self._queue = queue
        self.room = room or Room(inf, seqs=1, replicas=1)
        self._clock = clock
        self._numbers = itertools.count()
        self._waits: dict[RequestSlo, _Wait] = {}
        self._owners: dict[int, RequestSlo] = {}
        self._entries = BusyRate(credit=self.room.limit * _ANSWER_TOKENS)
        self._answer_tokens = _ANSWER_TOKENS
        self._tick: asyncio.TimerHandle | None = None

    @property
    def waiting_tokens(self) -> int:
        """Of prompts and expected answers."""
        return self._queue.tokens if self._queue is not None else 0

    async def enter(self, part: Part) -> bool:
        """Wait until ``part`` may go to a replica, which it then has to. False where its request has been refused: the
        part has been stopped. Cancelled, it leaves the queue."""
        request = part.request
        if request is not None:
            if self._queue is None:
                if not request.admitted:
                    self._count(request, Verdict.ADMITTED)
                request.admitted = True
            elif not request.admitted and request.halt is None:
                await self._decide(self._queue, request)
            if request.halt is not None:
                return False
        if not part.sent:
            self._send(part)
        return True

    def readmit(self, request: RequestSlo) -> None:
        """Let it in without a wait: it was inside before, and its client has lost it there."""
        if not request.admitted:
            self._count(request, Verdict.ADMITTED)
            self._admit(request)

    def began(self, part: Part, replica: str) -> None:
        """Its first token has come, from that replica. Again, or after its end, does nothing."""
        if part.over or part.has_begun:
            return
        part.first_s, part.replica = self._clock(), replica
        if part.sent:
            self.room.began(part, part.first_s)
            self._let_in()

    def ended(self, part: Part) -> None:
        """It is over. Again does nothing."""
        if part.over:
            return
        part.over, part.last_s = True, self._clock()
        if part.sent:
            self.room.ended(part, part.last_s)
            if part.has_begun:
                self._answer_tokens += (1 - _ANSWER_MEMORY) * (part.tokens - self._answer_tokens)
            self._let_in()

    def replicas(self, count: int, requests: int) -> None:
        """So many replicas answer, and have so many requests, of every ingress."""
        self.room.resize(count, requests, self._clock())
        self._let_in()

    def close(self) -> None:
        if self._tick is not None:
            self._tick.cancel()

    def _send(self, part: Part) -> None:
        part.sent = True
        self.room.sent(part, self._clock())

    async def _decide(self, queue: AdmissionQueue, request: RequestSlo) -> None:
        """Returns when ``request`` is admitted or refused."""
        wait = self._waits.get(request)
        if wait is None:
            now_s = self._clock()
            ticket = self._ticket(request, now_s)
            if self._keeps_pace:
                self.room.want(request.slo_class.tpot_ms / 1000, now_s)
            queue.capacity = self._entries.per_s(now_s, unknown=inf)
            decision = queue.offer(ticket, now_s, self.room.has_room(len(request.parts), now_s))
            self._count(request, decision.verdict)
            if decision.verdict is Verdict.ADMITTED:
                self._admit(request)
                return
            if decision.verdict is Verdict.REFUSED:
                request.stop(_refusal(decision.reason, decision.retry_after_s))
                return
            wait = self._waits[request] = _Wait(request, ticket, now_s)
            self._owners[ticket.number] = request
            self._queue_changed(queue)
        wait.parts += 1
        self.waiting += 1
        try:
            await wait.over.wait()
        finally:
            wait.parts -= 1
            self.waiting -= 1
            if not wait.parts and not wait.over.is_set():  # its client has gone, or its deadline
                queue.withdraw(wait.ticket)
                self._forget(wait.ticket, self._clock())
                self._queue_changed(queue)

    def _ticket(self, request: RequestSlo, now_s: float) -> Ticket:
        tokens = request.prompt_tokens
        return Ticket(
            number=next(self._numbers),
            slo_class=request.slo_class.name,
            tenant=request.tenant,
            tokens=max(1, tokens + round(self._answer_tokens * len(request.parts))),
            arrived_s=request.arrived_s,
            due_s=request.due_s,
            compute_s=self.room.prompt_s(tokens, now_s),
        )

    def _let_in(self) -> None:
        """Those whose turn it is, as long as there is room; those that would be late are refused."""
        queue = self._queue
        if queue is None or not queue.requests:
            return
        now_s = self._clock()
        for late in queue.drop_late(now_s):
            waited_s = now_s - late.arrived_s
            why = f"its first token would be late: it has waited {waited_s:.1f} s, {queue.requests} requests wait"
            refused = self._forget(late, now_s)
            self._count(refused, Verdict.REFUSED)
            refused.stop(_refusal(why, queue.comeback_s(late)))
        while (ticket := queue.peek()) is not None:
            if not self.room.has_room(len(self._owners[ticket.number].parts), now_s):
                break
            queue.take(now_s)
            self._entries.done(ticket.tokens, now_s)
            request = self._forget(ticket, now_s)
            self._count(request, Verdict.ADMITTED)
            self._admit(request)
        self._queue_changed(queue)

    def _admit(self, request: RequestSlo) -> None:
        """Its parts count as sent from here on, though their tasks run a moment later: the next one must not take their
        place."""
        request.admitted = True
        for part in request.parts:
            if not part.over:
                self._send(part)

    def _count(self, request: RequestSlo, verdict: Verdict) -> None:
        self.verdicts[request.slo_class.name, verdict] += 1

    def _forget(self, ticket: Ticket, now_s: float) -> RequestSlo:
        """It waits no more."""
        request = self._owners.pop(ticket.number)
        wait = self._waits[request]
        self.waited_s[request.slo_class.name] += now_s - wait.since_s
        self._waits.pop(request).over.set()
        return request

    def _queue_changed(self, queue: AdmissionQueue) -> None:
        self._entries.set_busy(queue.requests > 0, self._clock())
        if queue.requests and self._tick is None:
            self._tick = asyncio.get_running_loop().call_later(TICK_S, self._look_again)

    def _look_again(self) -> None:
        self._tick = None
        self._let_in()


def open_door(
    classes: Sequence[SloClass],
    admission: AdmissionConfig,
    seqs: int,
    replicas: int,
    ingresses: int,
    clock: Callable[[], float] = time.monotonic,
) -> Door:
    """The door of a model with ``replicas`` that run ``seqs`` requests each, of which ``ingresses`` processes have one
    each. Where all requests are of one class, and none may be refused, nobody is held back for the others' TPOT: it
    would only make each wait longer for its first token."""
    room = Room(ROOM_SHARE * min(one.ttft_ms for one in classes) / 1000, seqs, replicas, ingresses)
    if not admission.enabled:
        return Door(None, room, clock)
    limits = QueueLimits(max(1, admission.max_requests // ingresses), max(1, admission.max_tokens // ingresses))
    keeps_pace = len(classes) > 1 or classes[0].sheddable
    return Door(AdmissionQueue(classes, limits), room, clock, keeps_pace)


def _refusal(reason: str, retry_after_s: float) -> Stop:
    return Stop(Ending.REJECTED, HTTPStatus.TOO_MANY_REQUESTS, f"refused: {reason}", round(retry_after_s))
