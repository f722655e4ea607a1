"""Finds attempts that their replica does not take or answer, so that they can be made elsewhere. Pure: ``now`` is an
argument.

    sent --ACCEPT_S--> accepted --------------------> first token
           not taken     |  the whole replica is silent for SILENT_S
                         |  nothing comes from it for much longer than was predicted

Only attempts without a token: one that goes on elsewhere has its context computed again.
"""

import math
from collections.abc import Iterable
from typing import Protocol, TypeVar

from cluster.route import Route

ACCEPT_S = 3.0
SILENT_S = 3.0
_TTFT_SHARE = 5.0
_SOONEST_S = 10.0


class Attempt(Protocol):
    """A request on a replica: the tokens that have come so far, and how many had at the last look."""

    route: Route | None
    token_ids: list[int]
    seen: int

    @property
    def has_answered(self) -> bool:
        """Some of them came from this replica."""
        ...


A = TypeVar("A", bound=Attempt)


def unanswered(attempts: Iterable[A], now_s: float) -> list[tuple[A, str]]:
    """Those to give up, each with what is wrong. To be called every half a second or so: it notes who has got
    tokens."""
    waiting = []
    for one in attempts:
        route = one.route
        if route is None or route.replica is None or route.over:
            continue
        if not one.has_answered:
            waiting.append((one, route))
        elif len(one.token_ids) != one.seen:
            one.seen = len(one.token_ids)
            route.replica.heard_s = now_s
    return [(one, fault) for one, route in waiting if (fault := _fault(route, now_s)) is not None]


def _fault(route: Route, now_s: float) -> str | None:
    replica = route.replica
    if replica is None or math.isnan(route.sent_s):
        return None
    if now_s - replica.silent_since_s > SILENT_S:
        return f"replica {replica.replica_id} has not answered anything for {now_s - replica.silent_since_s:.1f} s"
    if math.isnan(route.accepted_s):
        waits_s = now_s - route.sent_s
        return f"replica {replica.replica_id} has not taken it for {waits_s:.1f} s" if waits_s > ACCEPT_S else None
    if math.isnan(route.predicted_ttft_s):
        return None
    waits_s = now_s - max(route.accepted_s, replica.heard_s)
    if waits_s > max(_SOONEST_S, _TTFT_SHARE * route.predicted_ttft_s):
        return (
            f"replica {replica.replica_id} has given no token to anybody for {waits_s:.1f} s, its first one was "
            f"predicted after {route.predicted_ttft_s:.1f} s"
        )
    return None
