"""How prompts share a step."""

from hypothesis import given
from hypothesis import strategies as st

from replicas.prompt_share import LEAST_PROMPT_TOKENS, fair_share, most_tokens
from replicas.step_time import StepTime

A_GPU = StepTime(step_s=4e-3, token_s=11e-6)


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


def test_a_step_is_as_large_as_pays() -> None:
    """Fifty times what a step takes anyway, decodes included; 8192 while that is not known; never below 512."""
    assert most_tokens(131_072, 131_072, A_GPU, rows=0, kv_tokens=0) == 18_181
    slower_decodes = StepTime(step_s=4e-3, kv_token_s=1e-8, token_s=11e-6)
    assert most_tokens(131_072, 131_072, slower_decodes, rows=10, kv_tokens=400_000) == 36_373
    assert most_tokens(131_072, 131_072, None, rows=3, kv_tokens=0) == 8195
    assert most_tokens(131_072, 131_072, StepTime(0.0, token_s=1e-3), rows=0, kv_tokens=0) == 512
    assert most_tokens(131_072, 131_072, StepTime(1.0), rows=0, kv_tokens=0) == 131_072


def test_a_target_bounds_it_but_for_the_decodes() -> None:
    assert most_tokens(100, 2048, A_GPU, rows=8, kv_tokens=0) == 100
    assert most_tokens(4, 2048, A_GPU, rows=8, kv_tokens=0) == 8 + LEAST_PROMPT_TOKENS
    assert most_tokens(4, 16, A_GPU, rows=8, kv_tokens=0) == 16
