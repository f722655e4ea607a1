"""What a replica is asked for, for whoever decides how many there should be: it crosses to Ray Serve's controller as
the replica's autoscaling stats, one number a name."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from replicas.step_time import StepTime


@dataclass(frozen=True)
class ReplicaDemand:
    """Attributes:
    prompt_rate, output_rate: tokens a second lately; prompts without what caches held; request_rate: of prompts.
    running, waiting: requests now; queued: those that wait in front of all replicas of the model, as every replica
        hears of them.
    kv_tokens: of the running requests; 0 where nobody counts them.
    step_s, row_s, kv_token_s, token_s, pair_s: of its step time, all 0 while it is not known.
    """

    prompt_rate: float = 0.0
    output_rate: float = 0.0
    request_rate: float = 0.0
    running: float = 0.0
    waiting: float = 0.0
    queued: float = 0.0
    kv_tokens: float = 0.0
    step_s: float = 0.0
    row_s: float = 0.0
    kv_token_s: float = 0.0
    token_s: float = 0.0
    pair_s: float = 0.0

    @property
    def step_time(self) -> StepTime | None:
        """None while it is not known."""
        parts = StepTime(self.step_s, self.row_s, self.kv_token_s, self.token_s, self.pair_s)
        return parts if any(parts.parts) else None

    def to_stats(self) -> dict[str, float]:
        """As Ray Serve takes it."""
        return asdict(self)


def demand_of(stats: Mapping[str, float]) -> ReplicaDemand:
    """What ``to_stats`` has told; names that are missing count as 0."""
    return ReplicaDemand(**{field.name: stats.get(field.name, 0.0) for field in fields(ReplicaDemand)})


class QueueBook:
    """Requests that wait in front of the replicas, by the ingress that has them. An ingress that has told nothing for
    some seconds is gone. Used by one thread."""

    _BELIEVED_S = 5.0

    def __init__(self) -> None:
        self._told: dict[str, tuple[float, int]] = {}

    def tell(self, ingress: str, requests: int, now_s: float) -> None:
        """So many wait there now."""
        self._told[ingress] = now_s, requests

    def total(self, now_s: float) -> int:
        """Of all ingresses."""
        self._told = {name: told for name, told in self._told.items() if now_s - told[0] <= self._BELIEVED_S}
        return sum(requests for _, requests in self._told.values())


class TokenMeter:
    """Counts tokens for their rate between two looks. Used by one thread."""

    def __init__(self, now_s: float) -> None:
        self.prompt_tokens = self.prompts = self.output_tokens = 0
        """Since the last look."""
        self._looked_s = now_s

    def rates(self, now_s: float) -> tuple[float, float, float]:
        """Prompt tokens, output tokens and prompts a second since the last look."""
        seconds = max(now_s - self._looked_s, 1e-3)
        told = self.prompt_tokens / seconds, self.output_tokens / seconds, self.prompts / seconds
        self._looked_s = now_s
        self.prompt_tokens = self.prompts = self.output_tokens = 0
        return told
