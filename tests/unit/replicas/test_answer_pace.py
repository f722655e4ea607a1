"""How long answers that have begun can wait. No clock."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicas.answer_pace import AnswerPace


def ended(pace: AnswerPace, tokens: int, count: int) -> None:
    """``count`` answers of ``tokens`` tokens each, begun and ended now."""
    for number in range(count):
        pace.observe(0.0, {f"before-{number}": tokens})
        pace.forget(f"before-{number}")


def test_slack_is_what_the_objective_leaves_beside_the_steps_to_come() -> None:
    """Ten tokens expected, nine gaps of a second allowed: after a step of a tenth there are 8.9 s less eight steps."""
    pace = AnswerPace(tpot_s=1.0)
    ended(pace, 10, 8)
    pace.observe(0.0, {"a": 1})
    assert pace.slack_s("a") == pytest.approx(9.0)
    pace.observe(0.1, {"a": 2})
    assert pace.slack_s("a") == pytest.approx(9.0 - 0.1 - 8 * 0.1)


def test_waiting_uses_it_up() -> None:
    """Second for second, until the objective is lost."""
    pace = AnswerPace(tpot_s=1.0)
    ended(pace, 10, 8)
    pace.observe(0.0, {"a": 1})
    pace.observe(9.5, {"a": 1})
    assert pace.slack_s("a") == pytest.approx(-0.5)
    assert pace.late
    pace.forget("a")
    assert not pace.late


def test_short_answers_before_leave_little_slack() -> None:
    """A quarter of short answers is enough to expect no more of the next one."""
    pace = AnswerPace(tpot_s=1.0)
    ended(pace, 100, 6)
    ended(pace, 4, 3)
    pace.observe(0.0, {"a": 1})
    assert pace.slack_s("a") == pytest.approx(3.0)


def test_an_answer_longer_than_expected_is_taken_to_end_now() -> None:
    """It has the slack that its tokens so far have earned."""
    pace = AnswerPace(tpot_s=1.0)
    ended(pace, 4, 8)
    pace.observe(0.0, {"a": 1})
    pace.observe(5.0, {"a": 11})
    assert pace.slack_s("a") == pytest.approx(10.0 - 5.0)


@given(st.lists(st.tuples(st.floats(0.001, 5.0), st.integers(0, 1)), min_size=1, max_size=60))
def test_a_positive_slack_keeps_its_word(steps: list[tuple[float, int]]) -> None:
    """Where the slack is not negative at an answer's last token, its time per output token is within the objective."""
    pace, now, count = AnswerPace(tpot_s=0.5), 0.0, 1
    ended(pace, 2, 8)
    pace.observe(now, {"a": count})
    for seconds, tokens in steps:
        now, count = now + seconds, count + tokens
        pace.observe(now, {"a": count})
    if count > 1 and pace.slack_s("a") >= 0:
        assert now / (count - 1) <= 0.5 + 1e-9
