"""How large a replica's steps and batches may be, so that its running requests keep their TPOT. Pure.

feed forward   the most prompt tokens a step, and requests at once, with which the step-time model keeps the goal
feedback       the goal is the target times a factor, lowered while measured TPOT is above the target, raised while it
               is well below: what the model does not know (gaps, neighbours) ends up in it

             measured / target     0 ... 0.85      0.85 ... 1      1 ...
             factor                5 % towards 1   stays           falls by up to a third, then waits for the effect

             Where a prompt has waited for most of its TTFT target the factor grows by a quarter instead, whatever TPOT
             is: longer steps compute more in all, and a queue that grows is late for everybody. A calm TPOT is no
             reason to go above 1: it may have been measured while no prompt came.

The factor counts for prompts alone: not every step has one, but every step decodes.

A ceiling falls at once and rises when it could have for a while. Steps are never so short that prompts could not be
computed as fast as they come. A TPOT that those who run would not keep however prompts are cut is no reason to hold
anybody up: then the engine's own settings are the bounds.
"""

import math
from dataclasses import dataclass, replace

from replicas.prompt_share import LEAST_PROMPT_TOKENS
from replicas.step_time import StepTime

_CALM, _RAISE = 0.85, 1.05
_FALL_MOST = 2 / 3
_HURRY, _HURRY_RAISE = 0.75, 1.25
_FACTOR_LEAST, _FACTOR_MOST = 0.25, 50.0
_EFFECT_S = 5.0
"""Until what was changed shows in the measured TPOT, which is that of answers that ended in about this time."""
_CHANGE = 0.1
"""A ceiling is replaced where it would move by more than this share: each change costs a message."""
_RISE_AFTER_S = 3.0
_HOPELESS = 1.1
"""Share of the target above which the best TPOT is taken not to keep it."""
_SPARE = 1.25
"""How much more than the prompts lately a step leaves room for."""
_MOVED_SHARE = 1 / 8
"""Of its requests, what a replica that is late gives away at a time where another one has room; it keeps _KEPT_SHARE
of what it could decode in time."""
_KEPT_SHARE = 1 / 4


@dataclass(frozen=True)
class BatchBounds:
    """What the engine can do: most requests at once, and most tokens a step; fewest of prompts, beside its decodes."""

    active_most: int
    tokens_most: int
    tokens_least: int = LEAST_PROMPT_TOKENS


@dataclass(frozen=True)
class BatchObservation:
    """One replica now.

    Attributes:
        running: requests; kv_tokens: before the next token of all of them.
        tpot_s: measured since the last look; NaN where there was none.
        tpot_target_s: the tightest of those that run, or may come.
        prompt_tokens: of a prompt, on average; prompt_of_token: of the prompt that a prompt's token is in, likewise.
        prompt_rate: of their tokens computed a second, lately.
        ttft_share: of its TTFT target, what the prompt that is nearest to it has waited.
        room_elsewhere: another replica of the model keeps its TPOT and could take requests.
    """

    running: int
    kv_tokens: float
    tpot_s: float
    tpot_target_s: float
    prompt_tokens: float = 512.0
    prompt_of_token: float = 512.0
    prompt_rate: float = 0.0
    ttft_share: float = 0.0
    room_elsewhere: bool = False

    @property
    def late(self) -> bool:
        """Its requests do not keep their TPOT."""
        return self.tpot_s > self.tpot_target_s

    @property
    def hurried(self) -> bool:
        """Prompts wait too long."""
        return self.ttft_share > _HURRY

    @property
    def calm(self) -> bool:
        """They keep it with something to spare, or there are none; and no prompt is in a hurry."""
        return not self.hurried and (not self.running or self.tpot_s < _CALM * self.tpot_target_s)


@dataclass(frozen=True)
class Ceiling:
    """One bound: what holds, 0 before the first; since when more would do, and the least of what would have."""

    value: int = 0
    more_since_s: float = math.inf
    more: int = 0

    def next(self, wanted: int, now_s: float) -> "Ceiling":
        """Down at once, up after a while, and not for a little."""
        if not self.value or self.value - wanted > max(1, _CHANGE * self.value):
            return Ceiling(wanted)
        if wanted <= (1 + _CHANGE) * self.value:
            return Ceiling(self.value)
        since_s = min(self.more_since_s, now_s)
        more = min(wanted, self.more) if self.more else wanted
        return Ceiling(more) if now_s - since_s >= _RISE_AFTER_S else Ceiling(self.value, since_s, more)


@dataclass(frozen=True)
class BatchSizing:
    """State of one replica's loop.

    Attributes:
        factor: goal over target; lowered_s: when it fell last.
        hopeless: no way of cutting prompts keeps the target.
        tokens, active: the ceilings that hold; given: of the requests that routers give it. It runs more of them where
            they come all the same: to let them wait would be late for them too.
    """

    factor: float = 1.0
    lowered_s: float = -math.inf
    hopeless: bool = False
    tokens: Ceiling = Ceiling()
    active: Ceiling = Ceiling()
    given: Ceiling = Ceiling()

    def next(self, seen: BatchObservation, step_time: StepTime, bounds: BatchBounds, now_s: float) -> "BatchSizing":
        """The state after a look at the replica."""
        moved = self._fed_back(seen, now_s)
        hopeless = best_tpot_s(seen, step_time) > (1.0 if self.hopeless else _HOPELESS) * seen.tpot_target_s
        if hopeless:
            tokens = bounds.tokens_most
        else:
            tokens = prompt_tokens_within(moved.factor * seen.tpot_target_s, seen, step_time, bounds)
            tokens = max(tokens, prompt_tokens_needed(seen, step_time, bounds))
        active = requests_within(seen.tpot_target_s, seen, step_time, bounds)
        given = active
        if seen.late and seen.room_elsewhere:
            stay = seen.running - math.ceil(seen.running * _MOVED_SHARE)
            given = min(active, max(stay, math.ceil(active * _KEPT_SHARE)))
        return replace(
            moved,
            hopeless=hopeless,
            tokens=self.tokens.next(tokens, now_s),
            active=self.active.next(active, now_s),
            given=self.given.next(given, now_s),
        )

    def _fed_back(self, seen: BatchObservation, now_s: float) -> "BatchSizing":
        """With the factor that follows from what was measured."""
        if seen.hurried:
            return replace(self, factor=min(self.factor * _HURRY_RAISE, _FACTOR_MOST))
        if not (math.isfinite(seen.tpot_s) and seen.tpot_s > 0):
            return self
        ratio = seen.tpot_s / seen.tpot_target_s
        if ratio > 1 and now_s - self.lowered_s >= _EFFECT_S:
            return replace(self, factor=max(self.factor * max(_FALL_MOST, 1 / ratio), _FACTOR_LEAST), lowered_s=now_s)
        if ratio < _CALM:
            calm = min(self.factor * _RAISE, 1.0) if self.factor < 1 else max(self.factor / _RAISE, 1.0)
            return replace(self, factor=calm)
        return self


def resumed(tokens: int, active: int, seen: BatchObservation, step_time: StepTime, bounds: BatchBounds) -> BatchSizing:
    """The state in which these ceilings, 0 for none, would have been set: what a controller goes on from that finds
    them at work."""
    if not tokens or tokens >= bounds.tokens_most:
        return BatchSizing(tokens=Ceiling(tokens), active=Ceiling(active))
    spent_s = step_time.decode_s(seen.running, seen.kv_tokens) + (tokens - seen.running) * _token_s(seen, step_time)
    factor = min(max(spent_s / seen.tpot_target_s, _FACTOR_LEAST), _FACTOR_MOST)
    return BatchSizing(factor=factor, tokens=Ceiling(tokens), active=Ceiling(active))


def best_tpot_s(seen: BatchObservation, step_time: StepTime) -> float:
    """What a token takes on average, however prompts are cut: a decode of those that run, in the part of the time that
    prompts leave; infinite where they leave none."""
    context = seen.kv_tokens / seen.running if seen.running else seen.prompt_tokens
    decode_s = step_time.decode_s(max(1, seen.running), context * max(1, seen.running))
    left = 1 - seen.prompt_rate * _mean_token_s(seen, step_time)
    return decode_s / left if left > 0 else math.inf


def prompt_tokens_needed(seen: BatchObservation, step_time: StepTime, bounds: BatchBounds) -> int:
    """Tokens of the smallest step, decodes included, with which prompts are computed somewhat faster than they were
    lately: shorter ones take up the engine with decoding."""
    rate = _SPARE * seen.prompt_rate
    left = 1 - rate * _mean_token_s(seen, step_time)
    tokens = rate * step_time.decode_s(seen.running, seen.kv_tokens) / left if left > 0 else math.inf
    return int(min(tokens + seen.running, bounds.tokens_most))


def prompt_tokens_within(goal_s: float, seen: BatchObservation, step_time: StepTime, bounds: BatchBounds) -> int:
    """Tokens of the largest step that takes no longer, decodes included; within the bounds."""
    spare_s = goal_s - step_time.decode_s(seen.running, seen.kv_tokens)
    a_token_s = _token_s(seen, step_time)
    tokens = spare_s / a_token_s if a_token_s > 0 else math.copysign(math.inf, spare_s)
    least = min(bounds.tokens_least, bounds.tokens_most)
    return int(min(max(tokens, least) + seen.running, bounds.tokens_most))


def requests_within(goal_s: float, seen: BatchObservation, step_time: StepTime, bounds: BatchBounds) -> int:
    """The most requests like those that run whose decode step takes no longer; all where not even one's does."""
    context = seen.kv_tokens / seen.running if seen.running else seen.prompt_tokens
    a_row_s = step_time.row_s + context * step_time.kv_token_s
    spare_s = goal_s - step_time.step_s
    rows = spare_s / a_row_s if a_row_s > 0 else math.copysign(math.inf, spare_s)
    return int(min(rows, bounds.active_most)) if rows >= 1 else bounds.active_most


def _mean_token_s(seen: BatchObservation, step_time: StepTime) -> float:
    """Of a prompt's token, on average."""
    return step_time.token_s + step_time.pair_s * seen.prompt_of_token / 2


def _token_s(seen: BatchObservation, step_time: StepTime) -> float:
    """Of a prompt's token near its end, where it has most to attend to."""
    return step_time.token_s + step_time.pair_s * seen.prompt_of_token
