"""One HTTP request on its way: what it was promised, and what has become of it so far.

    SLO layer --RequestSlo--> vLLM's application, AsyncLLM --Part--> ClusterCore, the model's door
              by a context variable                         one for each engine request: n answers are n parts

Times are on the monotonic clock, in seconds; NaN where it never came so far.
"""

import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus

from cluster.bench.report import Slo
from cluster.config import SloClass
from cluster.slo import Ending, Outcome


@dataclass(frozen=True, slots=True)
class Stop:
    """The cluster has ended a request itself: what its client is told, and how it counts.

    Attributes:
        ending: None for one that was wrong, which counts as nothing. retry_after_s: when it may come again.
    """

    ending: Ending | None
    status: HTTPStatus
    message: str
    retry_after_s: int | None = None


@dataclass(eq=False, slots=True)
class Part:
    """One engine request.

    Attributes:
        prompt_tokens: to be computed; stop: what ends it in the core.
        request: whose it is; None for one that came by no HTTP request.
        sent: it went to a replica; over: its end is known.
        first_s, last_s: of its tokens; tokens: of its answer, so far. resumed: of these, those that an earlier request
            with its key had computed; its times are of the others.
        replica: id of the one that answered, empty before its first token.
        failed: it ended with an error.
    """

    prompt_tokens: int
    stop: Callable[[], None]
    request: "RequestSlo | None" = None
    sent: bool = False
    over: bool = False
    first_s: float = math.nan
    last_s: float = math.nan
    tokens: int = 0
    resumed: int = 0
    replica: str = ""
    failed: bool = False

    @property
    def has_begun(self) -> bool:
        return not math.isnan(self.first_s)

    @property
    def tpot_s(self) -> float:
        """0 where there is no second token."""
        made = self.tokens - self.resumed
        return (self.last_s - self.first_s) / (made - 1) if made > 1 else 0.0


@dataclass(eq=False, slots=True)
class RequestSlo:
    """Belongs to the event loop that serves it.

    Attributes:
        slo: its targets: those of its class but for what its headers say.
        tenant: whose it is, once its body has been read.
        is_known: an API key has said so.
        session: whose replica it should go to again; empty for none.
        idempotency_key: by which its client finds its answer again; empty for none.
        admitted: it may go to a replica.
        halt: why the cluster has ended it, where it has.
    """

    slo_class: SloClass
    slo: Slo
    arrived_s: float
    tenant: str = ""
    is_known: bool = False
    session: str = ""
    idempotency_key: str = ""
    admitted: bool = False
    halt: Stop | None = None
    parts: list[Part] = field(default_factory=list)

    @property
    def prompt_tokens(self) -> int:
        """Of all parts that there are so far."""
        return sum(part.prompt_tokens for part in self.parts)

    @property
    def tokens(self) -> int:
        """Of prompts and answers, so far; without what was computed for an earlier request."""
        return sum(part.prompt_tokens + part.tokens - part.resumed for part in self.parts)

    @property
    def due_s(self) -> float:
        """When its first token should be there."""
        return self.arrived_s + (math.inf if self.slo.ttft_ms is None else self.slo.ttft_ms / 1000)

    def add(self, part: Part) -> None:
        """One more engine request; one that comes after the halt is stopped at once."""
        part.request = self
        self.parts.append(part)
        if self.halt is not None:
            part.stop()

    def stop(self, halt: Stop) -> None:
        """End it, whatever it is doing. The first reason counts."""
        if self.halt is None:
            self.halt = halt
            for part in self.parts:
                part.stop()

    def outcome(self, model: str, ending: Ending) -> Outcome:
        """What is counted. Of several parts: the first token of any, the slowest pace, the last end."""
        parts = [part for part in self.parts if part.has_begun]
        return Outcome(
            slo_class=self.slo_class.name,
            model=model,
            replica=parts[0].replica if parts else "",
            slo=self.slo,
            ending=ending,
            ttft_s=min((part.first_s for part in parts), default=math.nan) - self.arrived_s,
            tpot_s=max((part.tpot_s for part in parts), default=math.nan),
            latency_s=max((part.last_s for part in parts), default=math.nan) - self.arrived_s,
            output_tokens=sum(part.tokens for part in parts),
        )


CURRENT: ContextVar[RequestSlo | None] = ContextVar("ellm_request_slo", default=None)
"""The HTTP request that this task serves. Tasks that vLLM starts for it inherit it."""
