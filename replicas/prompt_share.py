"""How prompts share a step: so that a short one does not wait for all of a long one. Pure.

Each gets what it needs up to the same most, and the step is full (max-min fairness):

    budget 100, needs 10, 500, 30, 900        ->  30 at most: 10 + 30 + 30 + 30
"""

from collections.abc import Iterable

LEAST_PROMPT_TOKENS = 16
"""Beside its decodes a step has room for so many tokens of prompts at least, whatever a target says: a prompt always
gets on."""


def fair_share(needs: Iterable[int], budget: int) -> int:
    """Tokens that one prompt takes at most of a step of ``budget``; at least 1. ``needs``: tokens of each."""
    left, count = budget, 0
    waiting = sorted(needs)
    for count, need in enumerate(waiting):
        share = left // (len(waiting) - count)
        if need > share:
            return max(1, share)
        left -= need
    return max(1, budget)
