"""One attempt of a request on its way through the router of this process: what both of them know of it.

    ClusterCore --Route, an argument of generate()--> router: chooses, and writes down what it chose
    ClusterCore --first token, end, failure---------> router: what it knows of the replica

The router is made by Ray Serve and runs on a thread of its own, so nobody holds a reference to it. It writes its part
of a route, the core reads it; the core's news stand in a queue of the router's, which reads it when it chooses next. A
route pickles as None: nothing of it crosses to the replica.
"""

import math
import time
from collections import deque
from collections.abc import Set
from dataclasses import dataclass, field
from enum import Enum

from cluster.routing_policy import RouteRequest


class RouteEvent(Enum):
    """What became of an attempt."""

    FIRST_TOKEN = "first token"
    ENDED = "ended"
    FAILED = "failed"


@dataclass(eq=False)
class Standing:
    """A replica as one router sees it.

    Attributes:
        silent_since_s: when it was first asked something that it has not answered yet; infinity while it answers.
        gone: Ray Serve sends nothing to it any more: it is ending, or has died.
        heard_s: when one of its requests from here last got a token.
    """

    replica_id: str
    silent_since_s: float = math.inf
    heard_s: float = -math.inf
    gone: bool = False


News = deque[tuple[RouteEvent, "Route", float]]


@dataclass(eq=False)
class Route:
    """All times are of the monotonic clock; NaN before they come.

    Attributes:
        to: the replica that is wanted, where it is there; only: no other one will do.
        shut: replicas that should get no request while there is another one; the core's own set, which changes.
        replica: chosen or, once it was sent, taken; None before.
        tokens: of the prompt, taken to be computed there.
        predicted_ttft_s, predicted_tpot_s: of this attempt, from ``chosen_s`` on; NaN where nobody has predicted.
        sent_s: when Ray Serve sent it; accepted_s: when the replica had taken it.
        output_tokens: received at its end.
    """

    request: RouteRequest
    to: str | None = None
    only: bool = False
    shut: Set[str] = frozenset()
    replica: Standing | None = None
    tokens: int = 0
    predicted_ttft_s: float = math.nan
    predicted_tpot_s: float = math.nan
    chosen_s: float = math.nan
    sent_s: float = math.nan
    accepted_s: float = math.nan
    output_tokens: int = 0
    news: News | None = None
    """The router's, once it has chosen."""
    over: bool = field(default=False, init=False)

    def first_token(self) -> None:
        """Its first output has come."""
        if self.replica is not None:
            self.replica.heard_s = time.monotonic()
        self._tell(RouteEvent.FIRST_TOKEN)

    def failed(self) -> None:
        """The replica refused it, did not answer in time, or cannot be reached any more."""
        self._tell(RouteEvent.FAILED)

    def ended(self, output_tokens: int) -> None:
        """Nothing more comes of this attempt, whatever the reason."""
        self.output_tokens, self.over = output_tokens, True
        self._tell(RouteEvent.ENDED)

    def _tell(self, event: RouteEvent) -> None:
        if self.news is not None:
            self.news.append((event, self, time.monotonic()))

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()
