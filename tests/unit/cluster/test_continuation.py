"""What a request becomes that goes on at another replica."""

from typing import Any

import pytest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from cluster.continuation import continued, why_final
from tests.unit.cluster.fake_replicas import request


def test_the_answer_so_far_becomes_prompt() -> None:
    """The rest has what is left of both lengths, and the request is as it was."""
    whole = request()
    whole.sampling_params = SamplingParams(max_tokens=8, min_tokens=6, prompt_logprobs=2, logprobs=1)
    rest = continued(whole, [7, 8])
    assert rest.prompt_token_ids == [1, 2, 3, 7, 8]
    params = rest.sampling_params
    assert params is not None and whole.sampling_params is not None
    assert (params.max_tokens, params.min_tokens, params.prompt_logprobs, params.logprobs) == (6, 4, None, 1)
    assert (whole.prompt_token_ids, whole.sampling_params.max_tokens) == ([1, 2, 3], 8)


def test_without_a_token_it_is_the_same() -> None:
    whole = request()
    assert continued(whole, []) is whole


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"structured_outputs": StructuredOutputsParams(regex="a+")}, "structured output"),
        ({"presence_penalty": 0.5}, "penalty"),
        ({"frequency_penalty": -0.5}, "penalty"),
        ({"seed": 3, "temperature": 1.0}, "seed"),
        ({"bad_words": ["no"]}, "bad words"),
    ],
)
def test_what_depends_on_more_than_tokens_is_final(changes: dict[str, Any], said: str) -> None:
    whole = request()
    whole.sampling_params = SamplingParams(max_tokens=8, **changes)
    assert said in (why_final(whole) or "")


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0, "seed": 3}, {"repetition_penalty": 1.2, "logprobs": 3}])
def test_what_depends_on_tokens_alone_can_go_on(changes: dict[str, Any]) -> None:
    """A repetition penalty counts prompt and answer alike."""
    whole = request()
    whole.sampling_params = SamplingParams(max_tokens=8, **changes)
    assert why_final(whole) is None
