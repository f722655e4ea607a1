"""How long a step of an engine takes, by what it computes. Pure: measured steps in, seconds out.

    seconds = step_s  +  rows * row_s  +  kv_tokens * kv_token_s  +  tokens * token_s  +  pairs * pair_s
              always     |------- requests that decode -------|      |----- prompts, in chunks ------|

A decoded token reads the KV of all tokens before it; a prompt's tokens attend to each other in pairs, which costs far
less a pair where the machine has computing power to spare. ``StepTimeModel`` learns the five parts while an engine
runs: recursive least squares with exponential forgetting (Ljung, System Identification, section 11.2), kept in the
form of normal equations so that no part becomes negative; a step far off what is usual counts for as much as a step
that is just unusual (Huber, Robust Statistics, 1981).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_FORGETTING = 0.999
"""What is left of a step's weight after the next one: about the last thousand count."""
_PRIOR_STEPS = 0.05
"""Weight of the parts that were assumed, in steps as large as those seen: they decide what no step has shown."""
_UNUSUAL = 3.0
"""Mean absolute residuals from which a step counts for less."""
_SCALE_MEMORY = 0.98
_STEPS_BEFORE_DOUBT = 10
_OVERHEAD = 0.02
"""Share of a step's time beside its prompts that is too little to save."""


@dataclass(frozen=True)
class StepWork:
    """What one step computes.

    Attributes:
        rows: requests that decode, a token each; kv_tokens: tokens before these, over all of them.
        tokens: of prompts; pairs: for each of them the tokens of its prompt before it, over all.
    """

    rows: int = 0
    kv_tokens: float = 0.0
    tokens: int = 0
    pairs: float = 0.0

    @property
    def features(self) -> tuple[float, float, float, float, float]:
        """In the order of StepTime's fields."""
        return 1.0, self.rows, self.kv_tokens, self.tokens, self.pairs


def prompt_pairs(before: int, tokens: int) -> float:
    """Pairs of a chunk of ``tokens`` of a prompt, of which ``before`` are computed."""
    return tokens * (before + tokens / 2)


@dataclass(frozen=True)
class StepTime:
    """The parts of a step's time, in seconds; none is negative."""

    step_s: float
    row_s: float = 0.0
    kv_token_s: float = 0.0
    token_s: float = 0.0
    pair_s: float = 0.0

    @property
    def parts(self) -> tuple[float, float, float, float, float]:
        """In the order of StepWork's features."""
        return self.step_s, self.row_s, self.kv_token_s, self.token_s, self.pair_s

    def seconds(self, work: StepWork) -> float:
        """Of one step."""
        return (
            self.step_s
            + work.rows * self.row_s
            + work.kv_tokens * self.kv_token_s
            + work.tokens * self.token_s
            + work.pairs * self.pair_s
        )

    def decode_s(self, rows: int, kv_tokens: float, steps: int = 1) -> float:
        """Of ``steps`` steps that only decode ``rows`` requests, ``kv_tokens`` before the first of them."""
        first = self.step_s + rows * self.row_s + kv_tokens * self.kv_token_s
        return steps * (first + rows * self.kv_token_s * (steps - 1) / 2)

    def decodes_within(self, rows: int, kv_tokens: float, seconds: float) -> int:
        """How many such steps are whole after ``seconds``; the inverse of ``decode_s``."""
        growth = rows * self.kv_token_s / 2
        first = self.step_s + rows * self.row_s + kv_tokens * self.kv_token_s - growth
        if growth <= 0:
            return int(seconds / first)
        # steps * first + steps^2 * growth = seconds, in the form that stays exact where growth is tiny
        return int(2 * seconds / (first + math.sqrt(first * first + 4 * growth * seconds)))

    def worthwhile_tokens(self, rows: int = 0, kv_tokens: float = 0.0) -> float:
        """Tokens of prompts from which a larger step gains nothing worth its memory: what it computes whatever their
        number, decodes included, is a fiftieth of their own time. Infinite where they seem to take none."""
        wanted_s = (self.step_s + rows * self.row_s + kv_tokens * self.kv_token_s) / _OVERHEAD
        # tokens * token_s + tokens^2 / 2 * pair_s = wanted_s, in the form that stays exact where pair_s is tiny
        steepness = self.token_s + math.sqrt(self.token_s**2 + 2 * self.pair_s * wanted_s)
        return 2 * wanted_s / steepness if steepness > 0 else math.inf

    def prompt_s(self, tokens: int, chunk: int, rows: int = 0, kv_tokens: float = 0.0) -> float:
        """Of all steps that compute a prompt of ``tokens`` in chunks, ``rows`` requests decoding beside it."""
        steps = -(-tokens // max(1, chunk))
        beside = self.step_s + rows * self.row_s + kv_tokens * self.kv_token_s
        return steps * beside + tokens * self.token_s + prompt_pairs(0, tokens) * self.pair_s


class StepTimeModel:
    """Learns a StepTime from steps. Used by one thread.

    Args:
        prior: what is assumed until steps show otherwise.
        solve_every: steps from one solution to the next, which costs several times as much as taking in a step; the
            first ones are solved at once.
    """

    def __init__(self, prior: StepTime, solve_every: int = 1) -> None:
        self._prior = np.array(prior.parts)
        self._gram = np.zeros((len(self._prior), len(self._prior)))
        self._moment = np.zeros(len(self._prior))
        self._scale_s = 0.0
        self._fit = prior
        self._solve_every = solve_every
        self.observed = 0

    @property
    def step_time(self) -> StepTime:
        """The parts as they are known now."""
        return self._fit

    def observe(self, work: StepWork, seconds: float) -> None:
        """A step of ``work`` took ``seconds``. One without a finite time above 0 says nothing and is passed over."""
        if not (math.isfinite(seconds) and seconds > 0):
            return
        row = np.array(work.features)
        residual = abs(seconds - self._fit.seconds(work))
        weight = self._weight(residual)
        self._gram = _FORGETTING * self._gram + weight * np.outer(row, row)
        self._moment = _FORGETTING * self._moment + weight * seconds * row
        self.observed += 1
        # The scale follows what is unusual as well, so that a machine that has become slower is believed soon.
        self._scale_s = _SCALE_MEMORY * self._scale_s + (1 - _SCALE_MEMORY) * min(
            residual, 10 * self._bound_s(residual)
        )
        if self.observed <= _STEPS_BEFORE_DOUBT or self.observed % self._solve_every == 0:
            self._fit = StepTime(*(float(part) for part in self._solved()))

    def _bound_s(self, residual: float) -> float:
        return _UNUSUAL * self._scale_s if self._scale_s > 0 else residual

    def _weight(self, residual: float) -> float:
        """Huber's weight: 1 for what is usual; all of it is at first."""
        bound = self._bound_s(residual)
        return bound / residual if self.observed >= _STEPS_BEFORE_DOUBT and residual > bound > 0 else 1.0

    def _solved(self) -> Floats:
        """The parts, those unseen near the prior: a ridge towards it, scaled by each part's own size."""
        size = np.diag(self._gram)
        ridge = _PRIOR_STEPS * np.where(size > 0, size / max(self.observed, 1), 1.0)
        return nonnegative_solve(self._gram + np.diag(ridge), self._moment + ridge * self._prior)


def nonnegative_solve(gram: Floats, moment: Floats) -> Floats:
    """The solution of gram @ x = moment, of shape (n, n) and (n,), with what would be negative left out one by one,
    the most negative first; all 0 where nothing is left."""
    # Columns differ by many orders of magnitude: solve for them in units of their own size.
    size = np.sqrt(np.diag(gram))
    solution, parts = np.zeros(len(moment)), [int(part) for part in np.flatnonzero(size)]
    while parts:
        scaled = gram[np.ix_(parts, parts)] / np.outer(size[parts], size[parts])
        found = np.linalg.lstsq(scaled, moment[parts] / size[parts], rcond=1e-10)[0]
        if (found >= 0).all():
            solution[parts] = found / size[parts]
            break
        del parts[int(found.argmin())]
    return solution


def fit_step_time(works: Sequence[StepWork], seconds: Sequence[float]) -> StepTime:
    """Least squares over steps, in relative error, so that short steps count as much as long ones; no part negative."""
    weights = 1 / np.array(seconds)
    rows = np.array([work.features for work in works]) * weights[:, None]
    return StepTime(*(float(part) for part in nonnegative_solve(rows.T @ rows, rows.sum(axis=0))))
