"""Answers of the disturbed run against the right ones. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mismatch:
    """The first token of an answer that is not the right one.

    Attributes:
        prompt: its number. position: tokens before it that are right.
        right, got: token ids; None where that answer has ended before.
        gap: log probability of the best token there, less that of the second best; None where nobody has asked.
    """

    prompt: int
    position: int
    right: int | None
    got: int | None
    gap: float | None = None


def first_mismatch(prompt: int, right: Sequence[int], got: Sequence[int]) -> Mismatch | None:
    """Where the answers part; None where they are equal."""
    if list(right) == list(got):
        return None
    both = min(len(right), len(got))
    position = next((at for at in range(both) if right[at] != got[at]), both)
    return Mismatch(
        prompt,
        position,
        right[position] if position < len(right) else None,
        got[position] if position < len(got) else None,
    )
