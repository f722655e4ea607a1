"""The bounds of the elastic benchmark: arithmetic on bytes and rates."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.elastic.bounds import Job, Speed, advantage, best_chunk, fit_decode, fit_memory, makespan_s
from replicas.step_memory import Memory

MEMORY = Memory(block_bytes=1000, block_tokens=100, token_bytes=10.0, step_bytes=500.0)
SPEED = Speed(prefill_s={100: 4.0, 400: 2.0}, step_s=0.5, row_s=0.25, context_s=0.001)


def test_blocks_are_what_a_step_leaves() -> None:
    """A step of 100 tokens takes 1,500 bytes; of 10,000 bytes 8,500 are left, 8 blocks, one of them vLLM's null block.
    A request of 201 tokens takes 3."""
    assert MEMORY.activation_bytes(100) == 1500
    assert MEMORY.blocks(10_000, 100) == 8
    assert MEMORY.held(10_000, 100, 200) == 3
    assert MEMORY.held(10_000, 100, 201) == 2


@given(device_bytes=st.integers(0, 10**6), step=st.integers(1, 10**5), tokens=st.integers(1, 10**5))
def test_what_is_held_fits(device_bytes: int, step: int, tokens: int) -> None:
    """KV memory of the held requests, the null block and the step fit the device, and of one more they do not."""
    held = MEMORY.held(device_bytes, step, tokens)
    blocks = MEMORY.request_blocks(tokens)

    def needed(requests: int) -> int:
        return (requests * blocks + 1) * MEMORY.block_bytes + MEMORY.activation_bytes(step)

    assert held == 0 or needed(held) <= device_bytes
    assert needed(held + 1) > device_bytes


def test_the_line_through_peaks_is_found() -> None:
    """Two peaks give the bytes of a token and those of a step."""
    memory = fit_memory(1000, 100, [(512, 2024), (2048, 5096)])
    assert (memory.token_bytes, memory.step_bytes) == (pytest.approx(2), pytest.approx(1000))


def test_a_negative_constant_is_no_memory() -> None:
    """Noise can put the line below zero; a step of no tokens still takes nothing, not less."""
    assert fit_memory(1000, 100, [(100, 100), (200, 300)]).step_bytes == 0


@given(step_s=st.floats(0.001, 1), row_s=st.floats(0.001, 1), context_s=st.floats(1e-6, 1e-3), batch=st.integers(1, 50))
def test_decode_steps_are_fitted(step_s: float, row_s: float, context_s: float, batch: int) -> None:
    """From four measured steps of the assumed form the fit tells the seconds of any other."""
    truth = Speed({}, step_s, row_s, context_s)
    points = [(b, c, truth.decode_step_s(b, c)) for b, c in ((1, 100.0), (3, 100.0), (1, 2000.0), (3, 2000.0))]
    assert fit_decode({}, points).decode_step_s(batch, 1000) == pytest.approx(
        truth.decode_step_s(batch, 1000), rel=1e-4
    )


def test_no_part_of_a_decode_step_is_negative() -> None:
    """Steps that were measured faster with more context do not make context a gain."""
    speed = fit_decode({}, [(1, 100.0, 0.2), (3, 100.0, 0.4), (1, 2000.0, 0.15), (3, 2000.0, 0.35)])
    assert min(speed.step_s, speed.row_s, speed.context_s) >= 0
    assert speed.decode_step_s(2, 1000) == pytest.approx(0.275, rel=0.2)


def test_a_job_runs_in_waves() -> None:
    """Five requests, two at a time: three waves decode one after the other, and every prompt is computed."""
    job = Job(requests=5, prompt=200, output=10)
    two, one = 10 * SPEED.decode_step_s(2, 205), 10 * SPEED.decode_step_s(1, 205)
    assert makespan_s(job, 2, 400, SPEED) == pytest.approx(5 * 2.0 + 2 * two + one)
    assert makespan_s(job, 0, 400, SPEED) == float("inf")


def test_the_chunk_trades_speed_of_prefill_for_memory() -> None:
    """With plenty of memory the step size with the faster prefill is taken; with little the one that leaves KV memory
    for more requests at once; with too little none."""
    job = Job(requests=4, prompt=200, output=400)
    assert best_chunk(job, 10**6, MEMORY, SPEED, 2) == 400
    assert best_chunk(job, 14_500, MEMORY, SPEED, 2) == 100
    with pytest.raises(ValueError, match="12000 bytes leave 20"):
        best_chunk(job, 12_000, MEMORY, SPEED, 20)


def test_an_advantage_is_above_one_where_ours_is_better() -> None:
    """Of rates and of latencies alike, against A and against the best static variant."""
    rates, latencies = {"A": 2.0, "B": 8.0, "C": 5.0, "elastic": 6.0}, {"A": 12.0, "B": 2.0, "C": 6.0, "elastic": 4.0}
    assert advantage("rate", rates) == {"rate": 3.0, "rate_vs_best": 0.75}
    assert advantage("ttft", latencies, lower_is_better=True) == {"ttft": 3.0, "ttft_vs_best": 0.5}


@pytest.mark.parametrize("figure", [0.0, math.nan, math.inf])
def test_a_variant_without_a_figure_has_no_ratio(figure: float) -> None:
    assert advantage("rate", {"A": figure, "B": 1.0, "elastic": 2.0}) == {}
