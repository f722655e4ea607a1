"""What is killed, and when. Pure.

kinds in turn, each round in another order:   agent raylet engine controller replica | replica agent ...
a kill is due ``every_s`` after the one before, and waits until enough streams are in flight
"""

import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Kind(StrEnum):
    """What ends, by SIGKILL; a drain ends nothing."""

    ENGINE = "engine"
    """vLLM's EngineCore of a replica."""
    REPLICA = "replica"
    """The process of a Serve replica."""
    RAYLET = "raylet"
    """A node: its raylet, and every other process there."""
    AGENT = "agent"
    """The memory agent of a node."""
    CONTROLLER = "controller"
    DRAIN = "drain"
    """A replica is drained, and may have requests again before the next kill."""
    INGRESS = "ingress"
    """What serves the API: its clients lose their connections, and ask again."""


@dataclass
class Kill:
    """One that was done.

    Attributes:
        at_s: since the run began. victim: in words. hit: requests that the victim had; None where it can have none.
        in_flight: streams that had had a token since the kill before, and were not at their end.
        recovered_s: until what was killed was there again; None where it has not come back yet.
    """

    kind: Kind
    at_s: float
    victim: str
    hit: int | None
    in_flight: int
    recovered_s: float | None = None


@dataclass
class Turns:
    """Which kind is next. Each round has every kind once, in an order of its own that follows from ``seed``."""

    seed: int
    ingress: bool = False
    _left: list[Kind] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)

    def __iter__(self) -> Iterator[Kind]:
        return self

    def __next__(self) -> Kind:
        if not self._left:
            self._left = [kind for kind in Kind if self.ingress or kind is not Kind.INGRESS]
            self._rng.shuffle(self._left)
        return self._left.pop()


def most_streams(running: Mapping[str, int], known: Collection[str]) -> str | None:
    """Of the engines in ``known`` the one with the most requests by ``running``; None where none of them has any."""
    found = max((one for one in running if one in known), key=lambda one: running[one], default=None)
    return found if found is not None and running[found] else None
