"""How many bytes of activations a step of so many tokens needs. Pure: observations in, a conservative curve out.

Activations grow linearly with the tokens of a step, with a constant part for what does not (sampling, attention
scratch). The curve runs along the upper hull of what was observed, plus a margin, so it is not below any observation.
Beyond the largest one, where it knows less and allows for more, it goes on as if all of that one were by its tokens,
but no steeper than was assumed before the first: of a few tokens most is the constant part.
"""

from bisect import bisect_left
from collections import deque

_MARGIN, _MARGIN_BEYOND = 1.05, 1.15
"""On what was seen and on what is larger: equal steps differ by up to a tenth, and the first of its size takes more
than those after it."""
_BUCKETS_PER_OCTAVE = 4
"""Observations of about the same number of tokens share a memory: four such classes between n and 2n tokens."""
_REMEMBERED = 16
"""Observations a class remembers; one outlier is forgotten after as many steps."""


class ActivationProfile:
    """Bytes of activations by tokens of a step, learned from observed peaks.

    Args:
        prior_bytes_per_token: assumed until the first observation, per worker; at least what one more token can need.
    """

    def __init__(self, prior_bytes_per_token: int) -> None:
        assert prior_bytes_per_token > 0
        self._prior = prior_bytes_per_token
        self._seen: dict[int, deque[tuple[int, int]]] = {}
        self._tokens: list[int] = []
        self._bytes: list[int] = []

    @property
    def largest_tokens(self) -> int:
        """Tokens of the largest step that was observed; 0 before the first."""
        return self._tokens[-1] if self._tokens else 0

    def observe(self, tokens: int, peak_bytes: int) -> None:
        """A step of ``tokens`` (1 or more) held ``peak_bytes`` of activations at its peak, on the worker that held
        most."""
        assert tokens > 0
        peak_bytes = max(0, peak_bytes)
        remembered = self._seen.setdefault(_bucket(tokens), deque(maxlen=_REMEMBERED))
        remembered.append((tokens, peak_bytes))
        self._fit()

    def bytes_for(self, tokens: int) -> int:
        """Upper estimate for a step of ``tokens``; 0 for none, and never smaller for more tokens."""
        if tokens <= 0:
            return 0
        if not self._tokens:
            return tokens * self._prior
        at = bisect_left(self._tokens, tokens)
        if at == len(self._tokens):
            x, y = self._tokens[-1], self._bytes[-1]
            return int((y + min(y / x, self._prior) * (tokens - x)) * _MARGIN_BEYOND)
        if at == 0:  # below the smallest observation: as much as that one
            return int(self._bytes[0] * _MARGIN)
        x0, x1, y0, y1 = self._tokens[at - 1], self._tokens[at], self._bytes[at - 1], self._bytes[at]
        return int((y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)) * _MARGIN)

    def _fit(self) -> None:
        """The upper concave hull of the remembered observations, from left to right, never falling."""
        hull: list[tuple[int, int]] = []
        highest = 0
        for x, y in sorted(point for points in self._seen.values() for point in points):
            highest = max(highest, y)
            if hull and hull[-1][0] == x:
                hull.pop()
            while len(hull) > 1 and _rises_more(hull[-2], hull[-1], (x, highest)):
                hull.pop()
            hull.append((x, highest))
        self._tokens = [x for x, _ in hull]
        self._bytes = [y for _, y in hull]


def _bucket(tokens: int) -> int:
    octave = tokens.bit_length() - 1
    return octave * _BUCKETS_PER_OCTAVE + ((tokens - (1 << octave)) * _BUCKETS_PER_OCTAVE >> octave)


def _rises_more(a: tuple[int, int], b: tuple[int, int], c: tuple[int, int]) -> bool:
    """Is the slope from b to c at least that from a to b? Then b lies on or below the line from a to c."""
    return (c[1] - b[1]) * (b[0] - a[0]) >= (b[1] - a[1]) * (c[0] - b[0])
