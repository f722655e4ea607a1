"""Preempted requests come back by loading. An engine without a model, in which every position of every block counts."""

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from memory_agent.errors import OutOfDeviceMemory
from memory_agent.host_segment import Part
from memory_agent.lease_board import EngineWord
from replicas.host_moves import HostWork
from replicas.vllm_adapter import preempt
from tests.unit.replicas.always_pays import AlwaysPays
from tests.unit.replicas.modelless_engine import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    GUARANTEE_BLOCKS,
    ModellessEngine,
    modelless_engine,
    modelless_spec,
)
from tests.unit.replicas.modelless_worker import NAN

HOST_BLOCKS = 200
LIMITS_BLOCKS = (GUARANTEE_BLOCKS, 22, 30, 50)

both_schedulers = pytest.mark.parametrize("asynchronous", [False, True])


@contextmanager
def engine_with(
    asynchronous: bool, ranks: int = 1, host_blocks: int = HOST_BLOCKS, ttft_slo_ms: float = 0.0
) -> Iterator[ModellessEngine]:
    """An engine with a host buffer, whose lease is its guarantee at first."""
    with tempfile.TemporaryDirectory() as folder:
        spec = modelless_spec(Path(folder), ranks, host_blocks=host_blocks)
        spec = replace(spec, async_scheduling=asynchronous, ttft_slo_ms=ttft_slo_ms, tpot_slo_ms=1e9)
        with modelless_engine(Path(folder), spec, ranks) as engine:
            engine.host.traffic.break_even = AlwaysPays(BLOCK_BYTES, BLOCK_TOKENS)
            yield engine


def ask_some(engine: ModellessEngine, chance: random.Random, count: int = 10) -> None:
    """Requests of up to 450 tokens, half of which share a block and a bit."""
    for number in range(count):
        prompt, tokens = chance.randrange(45, 300), chance.randrange(20, 150)
        engine.ask(f"r{number}", prompt, tokens, shared=chance.choice([0, 40]))


def preempt_running(engine: ModellessEngine, request_id: str) -> None:
    preempt(engine.scheduler, engine.scheduler.requests[request_id])


def steps(engine: ModellessEngine, count: int) -> None:
    for _ in range(count):
        engine.step()
        engine.check()


def run_checked(engine: ModellessEngine) -> None:
    """To the end: exact tokens, balanced books, and no slot that is lost or held by what has ended."""
    engine.run()
    engine.settle(1.0)
    engine.check()
    engine.check_tokens()
    buffer = engine.host.traffic.buffer
    buffer.check_conservation()
    assert not (engine.host.tails._kept or engine.host._doubts)
    engine.host.clear()
    assert buffer.taken_slots == 0


def damage_next_load(engine: ModellessEngine, rank: int) -> None:
    """The blocks of the next step that loads any are damaged in the segment of this rank before it does."""
    copies = engine.workers[rank].copies
    assert copies is not None
    load, segment = copies.load, copies._segment

    def damaged(work: HostWork) -> None:
        for copy in work.load:
            with segment.path.open("r+b") as file:
                file.seek(segment._slots_at + copy.slot * segment._stride)
                file.write(NAN.tobytes())
        if work.load:
            copies.load = load  # type: ignore[method-assign]
        load(work)

    copies.load = damaged  # type: ignore[method-assign]


def refuse_next_store(engine: ModellessEngine, rank: int) -> None:
    """There is no memory for the next block that this rank stores."""
    copies = engine.workers[rank].copies
    assert copies is not None
    segment = copies._segment
    write = segment.write

    def refused(slot: int, key: bytes, parts: Sequence[Part]) -> None:
        segment.write = write  # type: ignore[method-assign]
        segment.release([slot])
        raise OutOfDeviceMemory("no memory")

    segment.write = refused  # type: ignore[method-assign]


@both_schedulers
def test_only_the_newest_token_is_computed_again(asynchronous: bool) -> None:
    """Under a lease that swings, every request that was preempted resumes with all that it had, wherever in a block it
    had stopped, in its prompt or behind it; one that decodes computes one token in its first step."""
    for seed in range(3):
        chance = random.Random(seed)
        with engine_with(asynchronous) as engine:
            ask_some(engine, chance)
            while engine.scheduler.has_unfinished_requests():
                if chance.random() < 0.1:
                    engine.set_limit(chance.choice(LIMITS_BLOCKS))
                steps(engine, 1)
            assert len(engine.resumptions) > 5
            for resumption in engine.resumptions:
                assert resumption.found == resumption.had
                if resumption.had >= len(engine.prompts[resumption.request_id]):
                    assert resumption.computes == 1
            assert engine.word(EngineWord.HOST_LOADED_TAILS) > 0
            run_checked(engine)


@both_schedulers
def test_every_place_in_a_block_is_a_good_place_to_stop(asynchronous: bool) -> None:
    """A request is preempted all the time: alone, so that it comes back at once, often before its load is confirmed."""
    chance = random.Random(1)
    with engine_with(asynchronous) as engine:
        engine.ask("r", prompt=40, tokens=400)
        while engine.scheduler.has_unfinished_requests():
            steps(engine, 1)
            if engine.scheduler.running and chance.random() < 0.7:
                preempt_running(engine, "r")
        assert {one.had % BLOCK_TOKENS for one in engine.resumptions} == set(range(BLOCK_TOKENS))
        assert all(one.computes == 1 for one in engine.resumptions)
        run_checked(engine)


@both_schedulers
def test_what_vllm_preempts_itself_comes_back_too(asynchronous: bool) -> None:
    """Under a lease that stays as it is, requests that grow push out one another: their blocks may be handed on in the
    very step that preempts."""
    with engine_with(asynchronous) as engine:
        engine.set_limit(20)
        for number in range(4):
            engine.ask(f"r{number}", prompt=100, tokens=200)
        run_checked(engine)
        assert engine.word(EngineWord.PREEMPTIONS) > 2
        assert all(one.found == one.had for one in engine.resumptions)


@both_schedulers
def test_those_set_aside_for_a_prompt_come_back_whole(asynchronous: bool) -> None:
    """Prompts are let in before there is memory to decode them."""
    with engine_with(asynchronous, ttft_slo_ms=1e-3) as engine:
        engine.set_limit(20)
        for number in range(6):
            engine.ask(f"r{number}", prompt=100 + number, tokens=100)
        run_checked(engine)
        assert engine.word(EngineWord.SET_ASIDE) > 0
        assert all(one.found == one.had for one in engine.resumptions)


@both_schedulers
@pytest.mark.parametrize("fault", [damage_next_load, refuse_next_store])
def test_a_tail_that_cannot_be_loaded_is_computed_again(
    asynchronous: bool, fault: Callable[[ModellessEngine, int], None]
) -> None:
    """Lost on one of two ranks, it costs the tokens of its block and is counted; the request goes on, and its next
    preemption is like any other."""
    with engine_with(asynchronous, ranks=2) as engine:
        engine.ask("r", prompt=40, tokens=80)
        steps(engine, 10)
        fault(engine, 1)
        preempt_running(engine, "r")
        steps(engine, 10)
        preempt_running(engine, "r")
        run_checked(engine)
        had = engine.resumptions[0].had
        assert 32 < had < 64
        assert [one.found for one in engine.resumptions[:2]] == [had, 32]
        assert engine.resumptions[-1].found == engine.resumptions[-1].had > had
        assert engine.word(EngineWord.HOST_DAMAGED_BLOCKS) == 1


@both_schedulers
def test_nobody_finds_what_was_computed_from_a_damaged_block(asynchronous: bool) -> None:
    """Requests that share blocks with one whose load fails, and find its blocks before that is known or after, get the
    tokens they should."""
    for wait in range(1, 5):
        with engine_with(asynchronous) as engine:
            for name in "ab":
                engine.ask(name, prompt=130, tokens=40, shared=128)
            steps(engine, 10)
            for name in "ba":
                preempt_running(engine, name)
            fill_device(engine)
            damage_next_load(engine, 0)
            steps(engine, wait)
            for name in "cde":
                engine.ask(name, prompt=150, tokens=20, shared=128)
            run_checked(engine)
            assert engine.word(EngineWord.HOST_DAMAGED_BLOCKS) > 0


@both_schedulers
@pytest.mark.parametrize("leaves", ["preempted", "given up"])
@pytest.mark.parametrize("loads", ["tail", "all"])
def test_a_request_that_leaves_before_its_failed_load_is_known_leaves_nothing(
    asynchronous: bool, leaves: str, loads: str
) -> None:
    """It has computed with the damaged block while that was on its way to the scheduler: its next tail is not taken for
    good, its token in flight does not count, and others who share its blocks compute them."""
    with engine_with(asynchronous) as engine:
        engine.ask("a", prompt=130, tokens=60, shared=128)
        steps(engine, 36)  # to the end of a block: the next token fills it
        preempt_running(engine, "a")
        if loads == "all":
            fill_device(engine)
        damage_next_load(engine, 0)
        if leaves == "given up" and not asynchronous:
            engine.gone.add("a")  # in the step that loads
        while not engine.resumptions:
            steps(engine, 1)
        if leaves == "given up":
            engine.gone.add("a")
        elif engine.scheduler.running:
            preempt_running(engine, "a")
        for name in "bcd":
            engine.ask(name, prompt=180, tokens=20, shared=128)
        run_checked(engine)
        assert engine.word(EngineWord.HOST_DAMAGED_BLOCKS) > 0


def fill_device(engine: ModellessEngine) -> None:
    """Other requests take the memory of those that wait, and end."""
    engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    steps(engine, 3)
    waiting = list(engine.scheduler.waiting)
    engine.scheduler.waiting.remove_requests(waiting)
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.ask("filling", prompt=500, tokens=10)
    steps(engine, 30)
    assert "filling" in engine.finished
    for request in reversed(waiting):
        engine.scheduler.waiting.prepend_request(request)


@both_schedulers
def test_a_tail_leaves_with_its_request(asynchronous: bool) -> None:
    """The client of a preempted request goes away, while its tail is being stored or after that: its slot is empty when
    the engine is idle."""
    for wait in range(4):
        with engine_with(asynchronous) as engine:
            for name in ("r", "other"):
                engine.ask(name, prompt=40, tokens=30)
            steps(engine, 10)
            engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
            preempt_running(engine, "r")
            assert engine.host.traffic.buffer.taken_slots == 1
            steps(engine, wait)
            engine.scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
            run_checked(engine)
            assert engine.host.traffic.buffer.taken_slots == 0
            assert engine.workers[0].copies is not None
            assert not engine.workers[0].copies._segment.scan()


def test_a_reset_keeps_nothing() -> None:
    """All KV is forgotten, as for new weights: requests that ran, and one that waited with a tail, compute all of it
    again."""
    with engine_with(asynchronous=False) as engine:
        for name in "abc":
            engine.ask(name, prompt=40, tokens=80)
        steps(engine, 10)
        engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
        preempt_running(engine, "a")
        steps(engine, 3)
        assert engine.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
        engine.scheduler.set_pause_state(PauseState.UNPAUSED)
        run_checked(engine)
        assert [one.found for one in engine.resumptions] == [0, 0, 0]


ACTIONS = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 12)),
    st.tuples(st.sampled_from(["preempt", "abort", "damage", "refuse"]), st.integers(0, 7)),
    st.tuples(st.just("lease"), st.sampled_from(LIMITS_BLOCKS)),
    st.tuples(st.just("ask"), st.integers(41, 300)),
)


@settings(deadline=None, max_examples=40)
@given(st.booleans(), st.integers(1, 2), st.sampled_from([4, HOST_BLOCKS]), st.lists(ACTIONS, max_size=40))
def test_tokens_are_exact_whatever_happens(
    asynchronous: bool, ranks: int, host_blocks: int, actions: list[tuple[str, int]]
) -> None:
    """Along any sequence of requests, leases, preemptions, clients that go away, and faults of the host buffer. Without
    faults, and with room for all, nothing that a request had is computed again."""
    with engine_with(asynchronous, ranks, host_blocks) as engine:
        for action, number in [("ask", 100), ("ask", 150), ("step", 5), *actions]:
            running = [request.request_id for request in engine.scheduler.running]
            if action == "step":
                steps(engine, number)
            elif action == "ask":
                engine.ask(f"r{len(engine.prompts)}", prompt=number, tokens=5 + number % 90, shared=40 * (number % 2))
            elif action == "lease":
                engine.set_limit(number)
            elif action == "damage":
                damage_next_load(engine, number % ranks)
            elif action == "refuse":
                refuse_next_store(engine, number % ranks)
            elif running and action == "preempt":
                preempt_running(engine, running[number % len(running)])
            elif running and action == "abort":
                engine.scheduler.finish_requests(running[number % len(running)], RequestStatus.FINISHED_ABORTED)
        run_checked(engine)
        if host_blocks == HOST_BLOCKS and not {"damage", "refuse"} & {action for action, _ in actions}:
            assert all(one.found == one.had for one in engine.resumptions)
