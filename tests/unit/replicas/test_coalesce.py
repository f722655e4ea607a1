"""Outputs of one request that wait together become one, where that loses nothing."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, FinishReason
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import LogprobsLists

from replicas.coalesce import coalesce


def gathered(outputs: list[EngineCoreOutput]) -> list[EngineCoreOutput]:
    waiting: list[EngineCoreOutput] = []
    for output in outputs:
        coalesce(waiting, output)
    return waiting


def logprobs() -> LogprobsLists:
    return LogprobsLists(np.array([[1, 2]]), np.array([[-0.5, -1.0]], dtype=np.float32), np.array([0]))


def first() -> EngineCoreOutput:
    events = [EngineCoreEvent.new_event(EngineCoreEventType.QUEUED)]
    return EngineCoreOutput("r", [1], events=events, prefill_stats=PrefillStats())


def test_plain_tokens_become_one_output() -> None:
    """Steps that only made tokens are one output, and the end ends it."""
    (one,) = gathered([EngineCoreOutput("r", [1]), EngineCoreOutput("r", [2, 3]), EngineCoreOutput("r", [4])])
    assert (one.new_token_ids, one.finished) == ([1, 2, 3, 4], False)
    end = EngineCoreOutput("r", [5], finish_reason=FinishReason.STOP, stop_reason=17)
    (one,) = gathered([EngineCoreOutput("r", [4]), end])
    assert (one.new_token_ids, one.finish_reason, one.stop_reason) == ([4, 5], FinishReason.STOP, 17)


def test_the_first_output_keeps_what_it_says_of_the_request() -> None:
    """Statistics and events of the first output stay with it when later tokens join it."""
    begin = first()
    stats, events = begin.prefill_stats, begin.events
    (one,) = gathered([begin, EngineCoreOutput("r", [2])])
    assert (one.new_token_ids, one.prefill_stats, one.events) == ([1, 2], stats, events)


def test_outputs_with_log_probabilities_stay_apart() -> None:
    """What belongs to single tokens is not mixed: such an output takes none in and goes into none."""
    outputs = [EngineCoreOutput("r", [n], new_logprobs=logprobs()) for n in range(3)]
    assert [output.new_token_ids for output in gathered(outputs)] == [[0], [1], [2]]
    mixed = [
        EngineCoreOutput("r", [1]),
        EngineCoreOutput("r", [2], new_logprobs=logprobs()),
        EngineCoreOutput("r", [3]),
    ]
    assert [output.new_token_ids for output in gathered(mixed)] == [[1], [2], [3]]


def test_an_output_that_says_more_later_is_not_lost() -> None:
    """Whatever an output carries beside tokens is there afterwards."""
    late = EngineCoreOutput("r", [2], finish_reason=FinishReason.LENGTH, kv_transfer_params={"block": 1})
    assert gathered([EngineCoreOutput("r", [1]), late])[-1].kv_transfer_params == {"block": 1}
    assert gathered([EngineCoreOutput("r", [1]), EngineCoreOutput("r", [2], num_nans_in_logits=3)])[
        -1
    ].num_nans_in_logits


@given(st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=3), st.booleans())))
def test_no_token_is_lost_or_moved(steps: list[tuple[list[int], bool]]) -> None:
    """However outputs mix, their tokens come in the same order, and every log probability is there."""
    outputs = [EngineCoreOutput("r", list(ids), new_logprobs=logprobs() if some else None) for ids, some in steps]
    together = gathered(outputs)
    assert [token for output in together for token in output.new_token_ids] == [t for ids, _ in steps for t in ids]
    assert sum(output.new_logprobs is not None for output in together) == sum(some for _, some in steps)
