"""How large a replica's steps and batches may be, so that its running requests keep their TPOT. Pure.

feed forward   the most prompt tokens a step, and requests at once, with which the step-time model keeps the goal
feedback       the goal is the target times a factor, lowered while measured TPOT is above the target, raised while
it
               is well below: what the model does not know (gaps, neighbours) ends up in it

             measured / target     0 ... 0.85      0.85 ... 1      1 ...
             factor                x 1.05          stays           falls by up to a third
"""

import math
from dataclasses import dataclass, field

from replicas.step_time import StepTime
from replicas.targets import ReplicaTarget

_CALM, _RAISE = 0.85, 1.05
_FALL_MOST = 2 / 3
_FACTOR_LEAST, _FACTOR_MOST = 0.25, 2.0
_CHANGE = 0.1
"""A target is replaced where one of its bounds moves by more than this share: each change costs a message."""


@dataclass(frozen=True)
class BatchBounds:
    """What the engine can do: most requests at once, and most tokens a step."""

    active_most: int
    tokens_most: int
    tokens_least: int = 16
    """A prompt always gets on."""


@dataclass(frozen=True)
class BatchObservation:
    """One replica now.

    Attributes:
        running: requests; kv_tokens: before the next token of all of them.
        tpot_s: measured lately; NaN where no request has ended.
        tpot_target_s: the tightest of those that run.
        prompt_tokens: of a prompt, on average.
    """

    running: int
    kv_tokens: float
    tpot_s: float
    tpot_target_s: float
    prompt_tokens: float = 512.0


@dataclass(frozen=True)
class BatchSizing:
    """State of one replica's loop: the factor, and the target that holds."""

    factor: float = 1.0
    target: ReplicaTarget = field(default_factory=lambda: ReplicaTarget(0))

    def next(self, seen: BatchObservation, step_time: StepTime, bounds: BatchBounds) -> "BatchSizing":
        """The state after a look at the replica. The target's revision grows where its bounds change."""
        factor = self.factor
        if math.isfinite(seen.tpot_s) and seen.tpot_s > 0:
            ratio = seen.tpot_s / seen.tpot_target_s
            if ratio > 1:
                factor *= max(_FALL_MOST, 1 / ratio)
            elif ratio < _CALM:
                factor *= _RAISE
        factor = min(max(factor, _FACTOR_LEAST), _FACTOR_MOST)
        goal_s = factor * seen.tpot_target_s
        tokens = prompt_tokens_within(goal_s, seen, step_time, bounds)
        active = requests_within(goal_s, seen, step_time, bounds)
        old = self.target
        if _differs(tokens, old.token_budget_max) or _differs(active, old.active_max):
            return BatchSizing(factor, ReplicaTarget(old.revision + 1, tokens, active))
        return BatchSizing(factor, old)


def prompt_tokens_within(goal_s: float, seen: BatchObservation, step_time: StepTime, bounds: BatchBounds) -> int:
    """Tokens of the largest step that takes no longer, decodes included; within the bounds."""
    spare_s = goal_s - step_time.decode_s(seen.running, seen.kv_tokens)
    a_token_s = step_time.token_s + step_time.pair_s * seen.prompt_tokens / 2
    tokens = spare_s / a_token_s if a_token_s > 0 else math.copysign(math.inf, spare_s)
    least = min(bounds.tokens_least, bounds.tokens_most)
    return int(min(max(tokens, least) + seen.running, bounds.tokens_most))


def requests_within(goal_s: float, seen: BatchObservation, step_time: StepTime, bounds: BatchBounds) -> int:
    """The most requests like those that run whose decode step takes no longer; at least 1."""
    context = seen.kv_tokens / seen.running if seen.running else seen.prompt_tokens
    a_row_s = step_time.row_s + context * step_time.kv_token_s
    spare_s = goal_s - step_time.step_s
    rows = spare_s / a_row_s if a_row_s > 0 else math.copysign(math.inf, spare_s)
    return int(min(max(rows, 1), bounds.active_most))


def _differs(new: int, old: int) -> bool:
    return abs(new - old) > _CHANGE * max(old, 1)
