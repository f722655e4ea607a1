"""What an open loop meets on an engine of known memory and speed."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.elastic.bounds import Speed
from benchmarks.elastic.forecast import Server, forecast
from cluster.bench.workload import Request
from replicas.elastic_prefill import Objectives
from replicas.step_memory import Memory

MEMORY = Memory(block_bytes=1, block_tokens=10, token_bytes=0.0, step_bytes=0.0)
SPEED = Speed(prefill_s={}, step_s=1.0, row_s=0.25, context_s=0.0)


def server(blocks: int, seqs: int = 8) -> Server:
    return Server(blocks, seqs, token_s=0.5, memory=MEMORY, speed=SPEED)


def requests(*shapes: tuple[int, int]) -> list[Request]:
    return [Request(i, np.zeros(prompt, np.int32), output) for i, (prompt, output) in enumerate(shapes)]


def test_one_request_alone() -> None:
    """Its prompt, then a step for each token after the first."""
    [record] = forecast(server(3), requests((4, 3)), [7.0])
    assert (record.sent_s, record.output_tokens) == (7.0, 3)
    assert record.ttft_s == pytest.approx(2.0)
    assert record.latency_s == pytest.approx(2.0 + 2 * 1.25)


def test_two_that_fit_decode_together_and_two_that_do_not_go_one_after_the_other() -> None:
    """The second waits for the first one's blocks; with room for both it waits for the first one's prompt alone."""
    work = requests((4, 3), (4, 3))
    both = forecast(server(2), work, [0.0, 0.0])
    assert [record.ttft_s for record in both] == pytest.approx([2.0, 4.0])
    assert [record.latency_s for record in both] == pytest.approx([4.0 + 2 * 1.5] * 2)
    one = forecast(server(1), work, [0.0, 0.0])
    assert [record.ttft_s for record in one] == pytest.approx([2.0, 4.5 + 2.0])


def test_who_was_admitted_last_is_displaced() -> None:
    """Two requests that need a block each at first and two later, on three blocks: the second starts over."""
    first, second = forecast(server(3), requests((8, 6), (8, 6)), [0.0, 0.0])
    assert second.ttft_s == pytest.approx(8.0)
    assert first.latency_s < second.latency_s
    apart = forecast(server(4), requests((8, 6), (8, 6)), [0.0, 0.0])
    assert second.latency_s > apart[1].latency_s


def test_what_never_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="a request of 3 KV blocks never fits 2"):
        forecast(server(2), requests((4, 2), (20, 5)), [0.0, 0.0])


def test_a_prompt_goes_before_answers_that_can_wait() -> None:
    """Room for one: with a host buffer and objectives the second prompt is computed while the first answer waits, which
    then goes on without computing its own prompt again."""
    work = requests((8, 40), (18, 2))
    plain = forecast(server(5), work, [0.0, 44.0])
    eager = forecast(replace(server(5), host_blocks=9, objectives=Objectives(5.0, 10.0)), work, [0.0, 44.0])
    assert eager[1].ttft_s < plain[1].ttft_s
    assert max(one.sent_s + one.latency_s for one in eager) <= max(one.sent_s + one.latency_s for one in plain)


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30), st.floats(0, 100)), min_size=1, max_size=12),
    st.integers(6, 20),
    st.integers(1, 6),
    st.sampled_from([None, Objectives(2.0, 1.0), Objectives(50.0, 0.1)]),
    st.integers(0, 40),
)
def test_every_request_gets_all_its_tokens(
    shapes: list[tuple[int, int, float]], blocks: int, seqs: int, objectives: Objectives | None, host_blocks: int
) -> None:
    """Whatever the load, with and without a host buffer, and the first token is never before the prompt could be
    computed."""
    dues = sorted(due for _, _, due in shapes)
    place = replace(server(blocks, seqs), host_blocks=host_blocks, objectives=objectives if host_blocks else None)
    records = forecast(place, requests(*((p, o) for p, o, _ in shapes)), dues)
    for record in records:
        assert record.output_tokens == record.asked_tokens
        assert record.ttft_s >= 0.5 * record.input_tokens - 1e-9
        assert record.latency_s >= record.ttft_s
