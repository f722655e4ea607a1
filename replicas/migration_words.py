"""What a request's ``SamplingParams.extra_args``, and an output's ``kv_transfer_params``, say of a migration.

source <---- PushOrder, a request of its own that is answered and never scheduled
source ----> Moved, with the last token of the request that moves
destination <---- Arrival, of a request whose KV lies in staging memory: pinned ahead, or the one that moves
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vllm.sampling_params import SamplingParams

PUSH_ARG = "ellm_push"
ARRIVAL_ARG = "ellm_arrival"
ANSWER_PARAM = "ellm_push_answer"
MOVED_PARAM = "ellm_moved"


@dataclass(frozen=True)
class PushOrder:
    """One round of the migration ``move`` of a running request.

    Attributes:
        taken: full blocks, from the first on, that the destination has: their places are free again.
        switch: stop the request at the next step boundary, and send what is left.
        end: the migration is over, one way or the other.
    """

    request_id: str
    move: str
    taken: int = 0
    switch: bool = False
    end: bool = False


@dataclass(frozen=True)
class PushAnswer:
    """
    Attributes:
        staged: full blocks that the destination can take, from the first on; ready: that the request has.
        error: why the migration cannot go on; the request does, where it is.
    """

    staged: int = 0
    ready: int = 0
    origin: str = ""
    error: str | None = None


@dataclass(frozen=True)
class Arrival:
    """KV that lies at ``origin``.

    Attributes:
        computed: tokens of the request that it has, from the first on.
        pin: keep the request's full blocks when it has ended, until the one that moves takes them.
    """

    origin: str
    move: str
    computed: int
    pin: bool = False


@dataclass(frozen=True)
class Moved:
    """The request has left; its KV lies at ``origin``, or will in a moment.

    Attributes:
        last: key of the block that comes there last, in hexadecimal.
    """

    origin: str
    move: str
    computed: int
    last: str = ""


def push_order(params: SamplingParams | None) -> PushOrder | None:
    """The order that a request is; None for any other request."""
    said = _said(params, PUSH_ARG)
    return PushOrder(**said) if said is not None else None


def arrival(params: SamplingParams | None) -> Arrival | None:
    """What is said of KV that has come ahead of the request."""
    said = _said(params, ARRIVAL_ARG)
    return Arrival(**said) if said is not None else None


def with_word(params: SamplingParams, word: PushOrder | Arrival) -> SamplingParams:
    """``params`` with ``word`` in them."""
    name = PUSH_ARG if isinstance(word, PushOrder) else ARRIVAL_ARG
    said = params.clone()
    said.extra_args = {**(params.extra_args or {}), name: asdict(word)}
    return said


def without_words(extra_args: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """``extra_args`` as a client may give them: migrations are the cluster's alone."""
    if not extra_args:
        return None
    return {name: value for name, value in extra_args.items() if name not in (PUSH_ARG, ARRIVAL_ARG)}


def _said(params: SamplingParams | None, name: str) -> dict[str, Any] | None:
    args = (params.extra_args if params is not None else None) or {}
    return args.get(name)
