"""Whether replicas would begin one more request about now, by what one ingress sees. Pure: ``now_s`` is an argument.

    places  |#### #### ##  |  requests that the engines run at once; those of this ingress
    sent    1  2  3' 4  5' 6  7  8     ' has a first token
                           `--+--'     tokens of their prompts / rate at which first tokens come = wait of the next one

An engine serves first come, first served, so whoever waits there is out of the order of classes. A request enters when
it would not wait longer than ``patience_s``: engines are kept just busy, and what their limits and their memory allow
is found out by how fast they are. Nor does it enter where the TPOT of those inside would suffer
(``cluster.pace_limit``).

Which replica a request went to is not known here before its first token. But who is overtaken, by one that was sent
later and has begun, waits at a replica that is slower than another, so the next one does not wait behind it. Nor
behind one that waits for very long: that one lacks something else than its turn.
"""

import math
from typing import Protocol

from cluster.busy_rate import BusyRate
from cluster.pace_limit import PaceLimit

_VERY_LONG = 4.0
"""Times the patience."""
_STALLED_S = 5.0
"""One that gets no token for so long says nothing of the pace of the others."""


class Guest(Protocol):
    """A request in a replica: ``cluster.request_slo.Part`` is one."""

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def tokens(self) -> int:
        """Of its answer, so far."""


class Room:
    """The requests of one model that are in its replicas from here. Used by one thread.

    Attributes:
        inside: requests in replicas; pending: those without a first token.
    """

    def __init__(self, patience_s: float, seqs: int, replicas: int, ingresses: int = 1) -> None:
        """
        Args:
            patience_s: a request may wait in an engine.
            seqs: requests that a replica runs at once.
            replicas: that there are, until ``resize`` says otherwise.
            ingresses: processes that share the replicas.
        """
        self.inside = self.pending = 0
        self._patience_s, self._seqs, self._ingresses = patience_s, seqs, ingresses
        self._prompts, self._ends = BusyRate(), BusyRate()
        self._pace = PaceLimit(1)
        self._ahead: dict[Guest, float] = {}
        """Those that the next one might wait behind, in the order in which they were sent, and when."""
        self._ahead_tokens = 0
        self._decoding: dict[Guest, tuple[int, float]] = {}
        """Those with a first token: tokens that are counted, and when."""
        self._replicas = self._places = 0
        self.resize(replicas, 0, -math.inf)

    @property
    def limit(self) -> int:
        """Requests that are let in, but for what the engines would begin in a moment."""
        return int(min(self._pace.limit, self._places))

    def resize(self, replicas: int, requests: int, now_s: float) -> None:
        """There are so many replicas now, and in all of them so many requests, of every ingress. This one has its equal
        part of the places, or what the others leave, if that is more."""
        total = replicas * self._seqs
        others = max(0, requests - self.inside) if self._ingresses > 1 else 0
        self._replicas = replicas
        self._places = max(total // self._ingresses, total - others)
        self._pace.floor = max(1, replicas // self._ingresses)
        self._look(now_s)

    def want(self, tpot_s: float, now_s: float) -> None:
        """A request with this target is at the door."""
        self._pace.want(tpot_s, now_s)

    def has_room(self, requests: int, now_s: float) -> bool:
        """Whether so many more would be begun about now."""
        if not self._replicas:
            return False
        wanted = self.inside + requests
        over = wanted - self._places
        if self.inside and (
            wanted > self._pace.limit
            or (over > 0 and self._ends.seconds_for(over, now_s, unknown=math.inf) > self._patience_s)
        ):
            return False
        self._pass_over(now_s)
        waits_s = self._prompts.seconds_for(self._ahead_tokens, now_s, unknown=0.0)
        return len(self._ahead) < self._replicas or waits_s <= self._patience_s

    def prompt_s(self, tokens: int, now_s: float) -> float:
        """How long a prompt takes, at the rate of all; 0 before any was computed."""
        return self._prompts.seconds_for(tokens, now_s, unknown=0.0)

    def sent(self, guest: Guest, now_s: float) -> None:
        """A request went to a replica."""
        self.inside += 1
        self.pending += 1
        self._ahead[guest] = now_s
        self._ahead_tokens += guest.prompt_tokens
        self._look(now_s)

    def began(self, guest: Guest, now_s: float) -> None:
        """Its first token came; once for each that was sent."""
        self.pending -= 1
        self._prompts.done(guest.prompt_tokens, now_s)
        while guest in self._ahead:  # it, and those before it, which it has overtaken
            self._leave(next(iter(self._ahead)))
        self._decoding[guest] = guest.tokens, now_s
        self._look(now_s)

    def ended(self, guest: Guest, now_s: float) -> None:
        """It is over, with or without a first token; once for each that was sent."""
        self.inside -= 1
        self._ends.done(1, now_s)
        if guest in self._decoding:
            self._count(guest, now_s)
            del self._decoding[guest]
        else:
            self.pending -= 1
            if guest in self._ahead:
                self._leave(guest)
        self._look(now_s)

    def _pass_over(self, now_s: float) -> None:
        """Forget those that wait for very long."""
        while self._ahead:
            first, sent_s = next(iter(self._ahead.items()))
            if now_s - sent_s <= _VERY_LONG * self._patience_s:
                return
            self._leave(first)

    def _leave(self, guest: Guest) -> None:
        del self._ahead[guest]
        self._ahead_tokens -= guest.prompt_tokens

    def _count(self, guest: Guest, now_s: float) -> None:
        """Its tokens since the last time, and the time they took."""
        tokens, since_s = self._decoding[guest]
        if guest.tokens > tokens:
            self._pace.add(now_s - since_s, guest.tokens - tokens)
        elif now_s - since_s < _STALLED_S:
            return
        self._decoding[guest] = guest.tokens, now_s

    def _look(self, now_s: float) -> None:
        self._prompts.set_busy(bool(self._ahead), now_s)
        self._ends.set_busy(self.inside >= self._places, now_s)
        if self._pace.is_due(now_s):
            for guest in self._decoding:
                self._count(guest, now_s)
            self._pace.judge(self.inside, now_s)
