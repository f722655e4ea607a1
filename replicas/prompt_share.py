"""How many tokens a step computes, and how prompts share it: so that a short one does not wait for all of a long one.
Pure.

Each gets what it needs up to the same most, and the step is full (max-min fairness):

    budget 100, needs 10, 500, 30, 900        ->  30 at most: 10 + 30 + 30 + 30
"""

from collections.abc import Iterable

from replicas.step_time import StepTime

LEAST_PROMPT_TOKENS = 16
"""Beside its decodes a step has room for so many tokens of prompts at least, whatever a target says: a prompt always
gets on."""
_LEAST_WORTHWHILE, _UNKNOWN_WORTHWHILE = 512, 8192
"""Tokens of prompts that a step may have for the sake of speed whatever is known, and those of the first steps."""


def most_tokens(target: int, own: int, step_time: StepTime | None, rows: int, kv_tokens: float) -> int:
    """Tokens of a step at most: no more than are worth their activations' memory, and never as few as its decodes,
    which would starve the same requests for ever.

    Args:
        target, own: of the controller and of the engine; the latter is never exceeded.
        step_time: None while it is not known.
        rows, kv_tokens: of running requests, and their computed tokens.
    """
    worthwhile = step_time.worthwhile_tokens(rows, kv_tokens) if step_time is not None else _UNKNOWN_WORTHWHILE
    return beside_decodes(min(target, rows + max(worthwhile, _LEAST_WORTHWHILE)), own, rows)


def beside_decodes(bound: float, own: int, rows: int) -> int:
    """``bound``, but room for some tokens beside the decodes of ``rows``, and never more than the engine's ``own``."""
    return int(min(max(bound, rows + LEAST_PROMPT_TOKENS), own))


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
