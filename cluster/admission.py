"""Who may enter, who waits, who is refused: the queue in front of the replicas. Pure: ``now`` is an argument.

    offer --> room, nobody waits ----------------------------------------> admitted
          --> full, or its target cannot be met any more (sheddable) ----> refused, with Retry-After
          --> queued --> next: class by weight | tenant by what it got | earliest deadline

Replicas are kept just busy, so that order is decided here and not in their first-come, first-served queues. Between
classes, and between the tenants of a class, shares follow start-time fair queueing (Goyal et al., SIGCOMM 1996): each
has a virtual time that grows by tokens over weight when it is served, and the least goes next, so nobody starves. One
that had nothing to ask for has saved nothing up.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from cluster.config import SloClass

_RATE_MEMORY_S = 10.0
_RETRY_LEAST_S = 1.0


class Verdict(StrEnum):
    """What becomes of an offer."""

    ADMITTED = "admitted"
    QUEUED = "queued"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Ticket:
    """One request at the door.

    Attributes:
        tokens: of its prompt and its expected output.
        arrived_s, due_s: when it came, and when its first token should be there, on the caller's clock.
        compute_s: of its prompt on a replica that does nothing else.
    """

    number: int
    slo_class: str
    tenant: str
    tokens: int
    arrived_s: float
    due_s: float
    compute_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer to an offer, in words too. retry_after_s: when a refused one can be expected to find room."""

    verdict: Verdict
    reason: str
    retry_after_s: float = 0.0


@dataclass(frozen=True)
class QueueLimits:
    """Most that may wait, over all classes."""

    requests: int = 10_000
    tokens: int = 20_000_000


class _Tenant:
    """Tickets of one tenant in one class, the earliest deadline first."""

    def __init__(self, virtual: float) -> None:
        self.virtual = virtual
        self.waiting: list[tuple[float, int, Ticket]] = []


class _Class:
    def __init__(self, settings: SloClass) -> None:
        self.settings = settings
        self.virtual = 0.0
        self.clock = 0.0
        """Virtual time of the tenant that was served last."""
        self.tokens = 0
        self.tenants: dict[str, _Tenant] = {}

    def add(self, ticket: Ticket) -> None:
        tenant = self.tenants.get(ticket.tenant)
        if tenant is None:
            tenant = self.tenants[ticket.tenant] = _Tenant(self.clock)
        elif not tenant.waiting:
            tenant.virtual = max(tenant.virtual, self.clock)
        heapq.heappush(tenant.waiting, (ticket.due_s, ticket.number, ticket))
        self.tokens += ticket.tokens

    def first(self) -> _Tenant:
        """The tenant whose turn it is; there must be one that waits."""
        waiting = ((tenant.virtual, name) for name, tenant in self.tenants.items() if tenant.waiting)
        return self.tenants[min(waiting)[1]]

    def take(self) -> Ticket:
        tenant = self.first()
        ticket = heapq.heappop(tenant.waiting)[2]
        self.clock = tenant.virtual
        tenant.virtual += ticket.tokens
        self.tokens -= ticket.tokens
        if not tenant.waiting and len(self.tenants) > 1000:  # those who have gone are forgotten now and then
            self.tenants = {name: one for name, one in self.tenants.items() if one.waiting}
        return ticket


class AdmissionQueue:
    """Used by one thread. ``classes``: by name; an unknown one is treated as the first.

    Attributes:
        requests, tokens: that wait.
        capacity: tokens a second that enter while others wait, where the owner knows. Without it the rate at which
            requests have entered in the last seconds counts, which is less where few came.
    """

    def __init__(self, classes: Sequence[SloClass], limits: QueueLimits | None = None) -> None:
        self._classes = {one.name: _Class(one) for one in classes}
        self._first = classes[0].name
        self._limits = limits or QueueLimits()
        self._clock = 0.0
        self._rate, self._rate_s = 0.0, -math.inf
        self.capacity: float | None = None
        self.requests = self.tokens = 0

    def offer(self, ticket: Ticket, now_s: float, room: bool) -> Decision:
        """A request comes. ``room``: a replica would begin it about now without harm to those it has."""
        if room and not self.requests:
            self._served(ticket.tokens, now_s)
            return Decision(Verdict.ADMITTED, "a replica has room")
        limits = self._limits
        if self.requests + 1 > limits.requests or self.tokens + ticket.tokens > limits.tokens:
            why = f"the queue is full: {self.requests} requests of {self.tokens} tokens wait"
            return Decision(Verdict.REFUSED, why, self._retry_after(self.wait_s(ticket)))
        one = self._class_of(ticket)
        wait_s = self.wait_s(ticket)
        late_s = now_s + wait_s + ticket.compute_s - ticket.due_s
        if late_s > 0 and one.settings.sheddable:
            why = f"its first token would be {late_s:.1f} s late: {one.tokens} tokens of its class wait"
            return Decision(Verdict.REFUSED, why, self._retry_after(late_s))
        if not one.tokens:
            one.virtual = max(one.virtual, self._clock)
        one.add(ticket)
        self.requests += 1
        self.tokens += ticket.tokens
        return Decision(Verdict.QUEUED, f"{self.requests - 1} requests wait")

    def peek(self) -> Ticket | None:
        """Who is next; None where nobody waits."""
        one = self._next_class()
        return one.first().waiting[0][2] if one is not None else None

    def take(self, now_s: float) -> Ticket:
        """The next one enters. Somebody must wait."""
        one = self._next_class()
        assert one is not None
        ticket = one.take()
        self._clock = one.virtual
        one.virtual += ticket.tokens / one.settings.weight
        self._gone(ticket)
        self._served(ticket.tokens, now_s)
        return ticket

    def withdraw(self, ticket: Ticket) -> None:
        """Take out one that waits, because nobody wants its answer any more."""
        one = self._class_of(ticket)
        waiting = one.tenants[ticket.tenant].waiting
        waiting.remove((ticket.due_s, ticket.number, ticket))
        heapq.heapify(waiting)
        one.tokens -= ticket.tokens
        self._gone(ticket)

    def drop_late(self, now_s: float) -> list[Ticket]:
        """Take out the requests of sheddable classes whose first token would be late even if they were begun now."""
        late = []
        for one in self._classes.values():
            if not one.settings.sheddable:
                continue
            for tenant in one.tenants.values():
                # By deadline, so the first that can make it ends the search, but for prompts of very different lengths.
                while tenant.waiting and now_s + tenant.waiting[0][2].compute_s > tenant.waiting[0][0]:
                    ticket = heapq.heappop(tenant.waiting)[2]
                    one.tokens -= ticket.tokens
                    self._gone(ticket)
                    late.append(ticket)
        return late

    def comeback_s(self, ticket: Ticket) -> float:
        """When one like this can be expected to be begun in time, if it comes again: whole seconds, at least 1."""
        return self._retry_after(self.wait_s(ticket) + ticket.compute_s - (ticket.due_s - ticket.arrived_s))

    def wait_s(self, ticket: Ticket) -> float:
        """How long a newcomer of its class is likely to wait, at the rate at which requests enter now: what waits in
        its class, at the class's share; never longer than all that waits. Infinite while nobody has entered."""
        if not self.tokens:
            return 0.0
        rate = self._rate if self.capacity is None else self.capacity
        if rate <= 0:
            return math.inf
        one = self._class_of(ticket)
        busy = sum(other.settings.weight for other in self._classes.values() if other.tokens or other is one)
        return min(one.tokens * busy / one.settings.weight, self.tokens) / rate

    def _class_of(self, ticket: Ticket) -> _Class:
        return self._classes.get(ticket.slo_class) or self._classes[self._first]

    def _next_class(self) -> _Class | None:
        waiting = [(one.virtual, name) for name, one in self._classes.items() if one.tokens]
        return self._classes[min(waiting)[1]] if waiting else None

    def _gone(self, ticket: Ticket) -> None:
        self.requests -= 1
        self.tokens -= ticket.tokens

    def _served(self, tokens: int, now_s: float) -> None:
        self._rate *= math.exp(-max(0.0, now_s - self._rate_s) / _RATE_MEMORY_S)
        self._rate += tokens / _RATE_MEMORY_S
        self._rate_s = now_s

    def _retry_after(self, wait_s: float) -> float:
        """Whole seconds, as the header has them, and never none: a client that comes back at once adds to the load."""
        if math.isinf(wait_s):
            wait_s = _RATE_MEMORY_S
        return float(max(_RETRY_LEAST_S, math.ceil(wait_s)))
