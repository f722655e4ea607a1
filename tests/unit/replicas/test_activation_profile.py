"""The activation curve: never below what was seen, never far above a linear truth, monotone."""

from hypothesis import given
from hypothesis import strategies as st

from replicas.activation_profile import ActivationProfile

OBSERVATIONS = st.lists(st.tuples(st.integers(1, 16384), st.integers(0, 1 << 32)), min_size=1, max_size=16)


def test_without_observations_the_prior_counts() -> None:
    profile = ActivationProfile(1000)
    assert profile.bytes_for(0) == 0
    assert profile.bytes_for(7) == 7000


@given(OBSERVATIONS)
def test_it_is_never_below_an_observation(observations: list[tuple[int, int]]) -> None:
    """As many as a class of sizes remembers."""
    profile = ActivationProfile(1)
    for tokens, peak in observations:
        profile.observe(tokens, peak)
    for tokens, peak in observations:
        assert profile.bytes_for(tokens) >= peak


@given(OBSERVATIONS, st.lists(st.integers(0, 40000), min_size=2, max_size=8))
def test_more_tokens_never_need_less(observations: list[tuple[int, int]], asked: list[int]) -> None:
    profile = ActivationProfile(1)
    for tokens, peak in observations:
        profile.observe(tokens, peak)
    estimates = [profile.bytes_for(tokens) for tokens in sorted(asked)]
    assert estimates == sorted(estimates)


@given(
    st.integers(0, 8 << 20),
    st.integers(1000, 100_000),
    st.lists(st.integers(16, 8192), min_size=2, max_size=20, unique=True),
    st.integers(16, 16384),
)
def test_a_linear_truth_is_met_within_a_quarter(fixed: int, slope: int, seen: list[int], asked: int) -> None:
    """Between and beyond the observations, from twice the smallest one on where a constant part exists."""
    profile = ActivationProfile(100_000)
    for tokens in seen:
        profile.observe(tokens, fixed + slope * tokens)
    truth = fixed + slope * asked
    assert profile.bytes_for(asked) >= truth or asked < min(seen)
    if min(seen) <= asked <= max(seen):
        assert profile.bytes_for(asked) <= 1.25 * truth


def test_one_observation_of_a_few_tokens_is_not_stretched() -> None:
    """Most of it is the constant part: sixteen times the tokens do not need sixteen times as much."""
    profile = ActivationProfile(1000)
    profile.observe(1, 500_000)
    assert 515_000 <= profile.bytes_for(16) <= 620_000


def test_an_outlier_is_forgotten() -> None:
    profile = ActivationProfile(1)
    profile.observe(512, 1 << 30)
    for _ in range(16):
        profile.observe(512, 1 << 20)
    assert profile.bytes_for(512) < 2 << 20
