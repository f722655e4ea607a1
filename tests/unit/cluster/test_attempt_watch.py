"""Which attempts are given up."""

import math
from dataclasses import dataclass, field

from cluster.attempt_watch import ACCEPT_S, SILENT_S, unanswered
from cluster.route import Route, Standing
from cluster.routing_policy import RouteRequest

NOW_S = 1000.0


@dataclass
class Attempt:
    route: Route | None
    token_ids: list[int] = field(default_factory=list)
    seen: int = 0
    base: int = 0

    @property
    def has_answered(self) -> bool:
        return len(self.token_ids) > self.base


def attempt(sent_s: float = NOW_S, accepted_s: float = math.nan, predicted_s: float = math.nan) -> Attempt:
    route = Route(RouteRequest(1), replica=Standing("a"), predicted_ttft_s=predicted_s)
    route.sent_s, route.accepted_s = sent_s, accepted_s
    return Attempt(route)


def given_up(*attempts: Attempt, after_s: float) -> list[Attempt]:
    return [one for one, fault in unanswered(attempts, NOW_S + after_s) if fault]


def test_what_is_not_taken_in_time_is_given_up() -> None:
    """From the sending on; what waits in the router, or was taken, is not overdue."""
    sent, waiting, taken = attempt(), attempt(sent_s=math.nan), attempt(accepted_s=NOW_S)
    assert given_up(sent, waiting, taken, Attempt(None), after_s=ACCEPT_S - 0.1) == []
    assert given_up(sent, waiting, taken, Attempt(None), after_s=ACCEPT_S + 0.1) == [sent]


def test_what_a_silent_replica_has_taken_is_given_up_unless_it_has_tokens() -> None:
    """Tokens that the client has seen cannot be taken back."""
    taken, begun = attempt(accepted_s=NOW_S), attempt(accepted_s=NOW_S)
    begun.token_ids.append(1)
    for one in (taken, begun):
        assert one.route is not None and one.route.replica is not None
        one.route.replica.silent_since_s = NOW_S
    assert given_up(taken, begun, after_s=SILENT_S - 0.1) == []
    assert given_up(taken, begun, after_s=SILENT_S + 0.1) == [taken]


def test_a_replica_that_gives_nothing_for_much_longer_than_predicted_is_given_up() -> None:
    """Without a prediction nobody knows how long a prompt takes; while others get tokens there its turn may come."""
    blind, short, long = (attempt(accepted_s=NOW_S, predicted_s=one) for one in (math.nan, 1.0, 10.0))
    assert given_up(blind, short, long, after_s=9.0) == []
    assert given_up(blind, short, long, after_s=11.0) == [short]
    assert given_up(blind, short, long, after_s=51.0) == [short, long]
    other = attempt(accepted_s=NOW_S)
    assert short.route is not None and other.route is not None
    other.route.replica = short.route.replica
    other.token_ids += [1, 2]
    assert given_up(short, other, after_s=52.0) == []
    assert given_up(short, other, after_s=61.0) == []
    assert given_up(short, other, after_s=63.0) == [short]
