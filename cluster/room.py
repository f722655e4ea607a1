"""Whether replicas would begin one more request about now, by what one ingress sees. Pure: ``now_s`` is an argument.

    places  |#### #### ##  |  requests that the engines run at once; those of this ingress
    prompts |tokens without a first token| / rate at which first tokens come = wait of the next one

An engine serves first come, first served, so whoever waits there is out of the order of classes. A request enters when
it would not wait longer than ``patience_s``: engines are kept just busy, and what their limits and their memory allow
is found out by how fast they are. Nor does it enter where the TPOT of those inside would suffer
(``cluster.pace_limit``).
"""

import math

from cluster.busy_rate import BusyRate
from cluster.pace_limit import PaceLimit


class Room:
    """The requests of one model that are in its replicas from here. Used by one thread.

    Attributes:
        inside: requests in replicas; pending: those without a first token; pending_tokens: of their prompts.
        tokens: that have come from replicas. Counted by whoever receives them.
    """

    def __init__(self, patience_s: float, seqs: int, replicas: int, ingresses: int = 1) -> None:
        """
        Args:
            patience_s: a request may wait in an engine.
            seqs: requests that a replica runs at once.
            replicas: that there are, until ``resize`` says otherwise.
            ingresses: processes that share the replicas.
        """
        self.inside = self.pending = self.pending_tokens = self.tokens = 0
        self._patience_s, self._seqs, self._ingresses = patience_s, seqs, ingresses
        self._prompts, self._ends = BusyRate(), BusyRate()
        self._pace = PaceLimit(1)
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
        waits_s = self._prompts.seconds_for(self.pending_tokens, now_s, unknown=0.0)
        return self.pending < self._replicas or waits_s <= self._patience_s

    def prompt_s(self, tokens: int, now_s: float) -> float:
        """How long a prompt takes, at the rate of all; 0 before any was computed."""
        return self._prompts.seconds_for(tokens, now_s, unknown=0.0)

    def sent(self, tokens: int, now_s: float) -> None:
        """A request went to a replica; ``tokens`` of its prompt."""
        self.inside += 1
        self.pending += 1
        self.pending_tokens += tokens
        self._look(now_s)

    def began(self, tokens: int, now_s: float) -> None:
        """Its first token came."""
        self._prompts.done(tokens, now_s)
        self._computed(tokens, now_s)

    def ended(self, tokens: int, has_begun: bool, now_s: float) -> None:
        """It is over, with or without a first token."""
        self.inside -= 1
        self._ends.done(1, now_s)
        if has_begun:
            self._look(now_s)
        else:
            self._computed(tokens, now_s)

    def _computed(self, tokens: int, now_s: float) -> None:
        self.pending -= 1
        self.pending_tokens -= tokens
        self._look(now_s)

    def _look(self, now_s: float) -> None:
        self._prompts.set_busy(self.pending > 0, now_s)
        self._ends.set_busy(self.inside >= self._places, now_s)
        self._pace.look(self.inside, self.inside - self.pending, self.tokens, now_s)
