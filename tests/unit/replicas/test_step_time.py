"""How long steps take, in closed form and as it is learned."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicas.step_time import StepTime, StepTimeModel, StepWork, fit_step_time, nonnegative_solve, prompt_pairs

TRUE = StepTime(step_s=0.01, row_s=2e-4, kv_token_s=1e-6, token_s=1e-4, pair_s=1e-8)

step_times = st.builds(
    StepTime,
    step_s=st.floats(1e-4, 1),
    row_s=st.floats(0, 1e-2),
    kv_token_s=st.one_of(st.just(0.0), st.floats(1e-12, 1e-4)),
)


def some_work(rng: random.Random) -> StepWork:
    rows = rng.randrange(0, 40)
    tokens = rng.choice([0, rng.randrange(1, 2048)])
    return StepWork(rows, rows * rng.randrange(1, 3000), tokens, prompt_pairs(rng.randrange(0, 4000), tokens))


@given(step_times, st.integers(1, 50), st.integers(0, 100_000), st.integers(1, 300))
def test_a_run_of_decodes_lasts_as_long_as_its_steps(step: StepTime, rows: int, kv_tokens: int, steps: int) -> None:
    """The closed form is the sum of the steps, each with one token more of every request."""
    singly = sum(step.decode_s(rows, kv_tokens + rows * at) for at in range(steps))
    assert step.decode_s(rows, kv_tokens, steps) == pytest.approx(singly, rel=1e-9)


@given(step_times, st.integers(1, 50), st.integers(0, 100_000), st.integers(1, 300), st.floats(0.01, 0.99))
def test_whole_steps_after_a_time(step: StepTime, rows: int, kv_tokens: int, steps: int, part: float) -> None:
    """Between the ends of two steps, as many are whole as have ended."""
    ended, next_ = (step.decode_s(rows, kv_tokens, count) for count in (steps, steps + 1))
    assert step.decodes_within(rows, kv_tokens, ended + part * (next_ - ended)) == steps


def test_fit_finds_the_parts() -> None:
    """Steps without noise give back exactly what made them."""
    rng = random.Random(1)
    works = [some_work(rng) for _ in range(200)]
    fitted = fit_step_time(works, [TRUE.seconds(work) for work in works])
    assert fitted.step_s == pytest.approx(TRUE.step_s, rel=1e-6)
    assert fitted.kv_token_s == pytest.approx(TRUE.kv_token_s, rel=1e-6)
    assert fitted.pair_s == pytest.approx(TRUE.pair_s, rel=1e-4)


def test_learns_from_a_wrong_beginning() -> None:
    """A model that starts ten times too slow predicts within 5 % after some hundred noisy steps."""
    rng = random.Random(2)
    model = StepTimeModel(StepTime(10 * TRUE.step_s, token_s=10 * TRUE.token_s))
    for _ in range(600):
        work = some_work(rng)
        model.observe(work, TRUE.seconds(work) * rng.uniform(0.9, 1.1))
    for _ in range(50):
        work = some_work(rng)
        assert model.step_time.seconds(work) == pytest.approx(TRUE.seconds(work), rel=0.05)


def test_outliers_do_not_mislead() -> None:
    """One step in twenty that takes a hundred times as long moves the prediction by less than a half."""
    rng = random.Random(3)
    model = StepTimeModel(TRUE)
    for at in range(800):
        work = some_work(rng)
        model.observe(work, TRUE.seconds(work) * (100 if at % 20 == 19 else rng.uniform(0.95, 1.05)))
    work = StepWork(20, 20_000, 512, prompt_pairs(0, 512))
    assert model.step_time.seconds(work) == pytest.approx(TRUE.seconds(work), rel=0.5)


def test_follows_a_machine_that_has_become_slower() -> None:
    """Twice the time for every step is believed in the end, though it looked like outliers at first."""
    rng = random.Random(4)
    model = StepTimeModel(TRUE)
    for factor, steps in ((1, 500), (2, 4000)):
        for _ in range(steps):
            work = some_work(rng)
            model.observe(work, factor * TRUE.seconds(work) * rng.uniform(0.95, 1.05))
    work = StepWork(20, 20_000, 512, prompt_pairs(0, 512))
    assert model.step_time.seconds(work) == pytest.approx(2 * TRUE.seconds(work), rel=0.1)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 500), st.floats(1e-4, 10)), min_size=1, max_size=40))
def test_no_part_is_ever_negative(steps: list[tuple[int, int, float]]) -> None:
    """Whatever was seen, no part of a step's time is below 0, nor anything but a number."""
    model = StepTimeModel(TRUE)
    for rows, tokens, seconds in steps:
        model.observe(StepWork(rows, rows * 100, tokens, prompt_pairs(0, tokens)), seconds)
    parts = vars(model.step_time).values()
    assert all(math.isfinite(part) and part >= 0 for part in parts)


@pytest.mark.parametrize("seconds", [math.nan, math.inf, 0.0, -1.0])
def test_a_time_that_is_none_teaches_nothing(seconds: float) -> None:
    """A broken clock leaves the model as it was."""
    model = StepTimeModel(TRUE)
    model.observe(StepWork(1, 10), seconds)
    assert model.observed == 0 and model.step_time == TRUE


def test_solution_leaves_out_what_would_be_negative() -> None:
    """Where the best solution has a negative part, the best one without that part is found."""
    rows = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    falling = np.array([3.0, 2.0, 1.0])
    assert nonnegative_solve(rows.T @ rows, rows.T @ falling) == pytest.approx([2.0, 0.0])


@given(
    step_times,
    st.one_of(st.just(0.0), st.floats(1e-9, 1e-2)),
    st.one_of(st.just(0.0), st.floats(1e-15, 1e-8)),
    st.integers(0, 256),
    st.integers(0, 1_000_000),
)
def test_a_larger_step_is_worth_it_until_the_rest_is_a_fiftieth(
    step: StepTime, token_s: float, pair_s: float, rows: int, kv_tokens: int
) -> None:
    step = replace(step, token_s=token_s, pair_s=pair_s)
    tokens = step.worthwhile_tokens(rows, kv_tokens)
    if math.isinf(tokens):
        assert token_s == pair_s == 0
        return
    prompts_s = tokens * (token_s + tokens / 2 * pair_s)
    assert prompts_s == pytest.approx(50 * step.decode_s(rows, kv_tokens))
