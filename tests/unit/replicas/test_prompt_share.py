"""How prompts share a step."""

from hypothesis import given
from hypothesis import strategies as st

from replicas.prompt_share import fair_share


def test_the_example() -> None:
    """Who needs little gets it, the others equal parts of the rest."""
    assert fair_share([10, 500, 30, 900], 100) == 30
    assert fair_share([500], 100) == 100
    assert fair_share([], 100) == 100
    assert fair_share([500, 500], 0) == 1


@given(st.lists(st.integers(1, 3000), max_size=40), st.integers(1, 4000))
def test_the_step_is_full_and_nobody_could_get_more(needs: list[int], budget: int) -> None:
    """What is taken fits the step but for one token each, and leaves nothing while somebody wants more."""
    most = fair_share(needs, budget)
    taken = sum(min(need, most) for need in needs)
    assert taken <= max(budget, len(needs))
    if taken < sum(needs):
        assert taken > budget - len(needs)
