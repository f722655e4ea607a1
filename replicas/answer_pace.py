"""How long an answer that has begun can wait and still keep its objective for the time per output token. Pure.

    first token |---- so far ----|---- slack ----|-- tokens to come, a step each --| last token
                |<---------------- objective x (expected tokens - 1) ------------->|

How many tokens an answer will have is not known; a low quartile of the answers before says how many it has at least,
most of the time. One that is longer already is taken to end now.
"""

from collections import deque
from collections.abc import Mapping

_FIRST_GUESS = 64
"""Tokens of an answer, before enough have ended."""
_REMEMBERED, _ENOUGH = 32, 8
"""Answers that the guess is made from, and how many there must be."""
_QUANTILE = 0.25
_SMOOTHING = 0.1
"""Weight of the newest step in the mean time of a step."""


class AnswerPace:
    """The answers of one engine. Lives in the scheduler's process; not thread-safe.

    Args:
        tpot_s: the objective, seconds a token after the first.
    """

    def __init__(self, tpot_s: float) -> None:
        self._tpot_s = tpot_s
        self._now_s = 0.0
        self._step_s: float | None = None
        self._first_at: dict[str, float] = {}
        self._tokens: dict[str, int] = {}
        self._ended: deque[int] = deque(maxlen=_REMEMBERED)
        self._expected = _FIRST_GUESS

    def observe(self, now_s: float, tokens: Mapping[str, int]) -> None:
        """An iteration begins. tokens: so far, of each answer that has some and has not ended."""
        grown = any(count > self._tokens.get(request_id, count) for request_id, count in tokens.items())
        if grown:
            seconds = now_s - self._now_s
            mean = seconds if self._step_s is None else self._step_s
            self._step_s = mean + _SMOOTHING * (seconds - mean)
        self._now_s = now_s
        for request_id, count in tokens.items():
            self._first_at.setdefault(request_id, now_s)
            self._tokens[request_id] = count

    @property
    def late(self) -> bool:
        """Has some answer that has not ended lost its objective?"""
        return any(self.slack_s(request_id) < 0 for request_id in self._tokens)

    def slack_s(self, request_id: str) -> float:
        """Seconds for which this answer, observed before, can wait; negative where its objective is lost already."""
        count = self._tokens[request_id]
        expected = max(count, self._expected)
        elapsed_s = self._now_s - self._first_at[request_id]
        to_come_s = (expected - count) * (self._step_s or 0.0)
        return self._tpot_s * max(expected - 1, 1) - elapsed_s - to_come_s

    def forget(self, request_id: str) -> None:
        """The answer has ended; one that has not begun changes nothing."""
        self._first_at.pop(request_id, None)
        count = self._tokens.pop(request_id, None)
        if count is None:
            return
        self._ended.append(count)
        if len(self._ended) >= _ENOUGH:
            self._expected = sorted(self._ended)[int(_QUANTILE * len(self._ended))]
