"""Random requests: reproducible, in range, sharing exactly the prefixes that were asked for."""

import numpy as np
import pytest

from cluster.bench.errors import BenchError
from cluster.bench.workload import MIN_TOKEN_ID, Workload, block_tokens, random_workload


def prompts(workload: Workload) -> list[list[int]]:
    return [request.prompt.tolist() for request in workload.requests]


def test_the_seed_alone_decides_prompts_and_lengths() -> None:
    """Equal seeds give equal requests, another seed shares no prompt with them."""
    first, again, other = (
        random_workload(20, input_len=30, output_len=10, range_ratio=0.5, seed=seed) for seed in (1, 1, 2)
    )
    assert prompts(first) == prompts(again)
    assert [one.output_len for one in first.requests] == [one.output_len for one in again.requests]
    assert not {tuple(prompt) for prompt in prompts(first)} & {tuple(prompt) for prompt in prompts(other)}


def test_lengths_fill_the_range_around_their_mean() -> None:
    """With ratio 0.5 they lie in [len / 2, 3 len / 2] and reach both ends; with ratio 0 all are equal."""
    work = random_workload(2000, input_len=20, output_len=10, range_ratio=0.5)
    assert {len(request.prompt) for request in work.requests} == set(range(10, 31))
    assert {request.output_len for request in work.requests} == set(range(5, 16))
    fixed = random_workload(50, input_len=20, output_len=10)
    assert {(len(request.prompt), request.output_len) for request in fixed.requests} == {(20, 10)}


def test_prompts_share_the_prefixes_and_nothing_more() -> None:
    """The prefix comes on top of the input length; there are as many as asked for; what follows is each one's own."""
    work = random_workload(60, input_len=16, output_len=1, prefix_len=8, prefixes=3)
    assert {len(prompt) for prompt in prompts(work)} == {24}
    assert len({tuple(prompt[:8]) for prompt in prompts(work)}) == 3
    assert len({tuple(prompt[8:]) for prompt in prompts(work)}) == 60


def test_token_ids_spread_over_the_vocabulary_and_stay_inside() -> None:
    """From MIN_TOKEN_ID to below the vocabulary's size, evenly."""
    ids = block_tokens(0, np.zeros(64000, np.int64), np.arange(64000), MIN_TOKEN_ID + 64)
    counts = np.bincount(ids - MIN_TOKEN_ID, minlength=64)
    assert len(counts) == 64
    assert 850 < counts.min() <= counts.max() < 1150


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"requests": 0}, "--num-requests 0"),
        ({"output_len": 0}, "--output-len 0"),
        ({"range_ratio": 1.0}, "--range-ratio 1"),
        ({"prefixes": 0}, "--num-prefixes 0"),
        ({"input_len": 0}, "--input-len"),
        ({"vocab_size": 1000}, "--vocab-size 1000"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_what_gives_no_requests_is_refused_by_name(given: dict[str, int], option: str) -> None:
    """The error names the option."""
    settings = {"requests": 4, "input_len": 8, "output_len": 4} | given
    with pytest.raises(BenchError, match=option):
        random_workload(settings.pop("requests"), **settings)  # type: ignore[arg-type]
