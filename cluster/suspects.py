"""Requests that replicas die of: each is noticed at its second death, and refused when it comes again.

A death counts against those requests that were at the replica and had no token from it. A token clears a request, also
of whoever asks the same: so what merely stood beside, or is asked often, is not suspected for long.
"""

import hashlib
import time
from array import array
from collections.abc import Callable

from vllm.v1.engine import EngineCoreRequest

DEATHS = 2
"""After so many without a token between them a request is taken to be the cause."""
REFUSED_S = 600.0
_MOST = 1024


class Suspects:
    """Of one core. Requests are the same that have the same prompt; of those without token ids none is suspected."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._deaths: dict[bytes, tuple[int, float]] = {}
        """By digest of the prompt: how many, and when the last one was; the oldest first."""

    def __len__(self) -> int:
        return len(self._deaths)

    def died_with(self, request: EngineCoreRequest) -> None:
        """A replica has died that had it, and had given no token of it."""
        if not request.prompt_token_ids:
            return
        one = _digest(request)
        count, _ = self._deaths.pop(one, (0, 0.0))
        self._deaths[one] = count + 1, self._clock()
        if len(self._deaths) > _MOST:
            del self._deaths[next(iter(self._deaths))]

    def answered(self, request: EngineCoreRequest) -> None:
        """It has a token."""
        if self._deaths:
            self._deaths.pop(_digest(request), None)

    def why_refused(self, request: EngineCoreRequest) -> str | None:
        """Why it is not to reach another replica; None where it may."""
        if not self._deaths:
            return None
        count, last_s = self._deaths.get(_digest(request), (0, 0.0))
        left_s = last_s + REFUSED_S - self._clock()
        if count < DEATHS or left_s <= 0:
            return None
        return (
            f"{count} replicas have died while they computed this prompt, so it is refused for {left_s:.0f} s more; "
            "their logs say what they died of"
        )


def _digest(request: EngineCoreRequest) -> bytes:
    return hashlib.blake2b(array("q", request.prompt_token_ids or ()).tobytes(), digest_size=16).digest()
