"""An engine whose memory is refused, late or gone: requests wait and finish, and the books balance after every step."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from memory_agent.lease_board import EngineWord
from memory_agent.vmm import ContractViolation
from replicas.kv_moves import KvMoves
from tests.unit.replicas.modelless_engine import (
    GUARANTEE_BLOCKS,
    LONGEST_BLOCKS,
    LONGEST_TOKENS,
    REST_BLOCKS,
    ModellessEngine,
    modelless_engine,
)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[ModellessEngine]:
    with modelless_engine(tmp_path) as engine:
        yield engine


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[ModellessEngine]:
    """An engine of two ranks."""
    with modelless_engine(tmp_path, ranks=2) as engine:
        yield engine


def run_checked(engine: ModellessEngine, steps: int = 3000) -> None:
    """Run to the end of all requests, checking all books after every step."""
    for _ in range(steps):
        if not engine.scheduler.has_unfinished_requests():
            engine.check_tokens()
            return
        engine.step()
        engine.check()
    raise AssertionError("requests are still unfinished")


def test_a_burst_runs_in_the_lease_and_the_idle_engine_rests(engine: ModellessEngine) -> None:
    """The plain case that the faults below are measured by."""
    engine.set_limit(40)
    for number in range(6):
        engine.ask(f"r{number}", prompt=150, tokens=60)
    run_checked(engine)
    assert len(engine.finished) == 6
    assert REST_BLOCKS < engine.held_blocks <= 40
    engine.settle()
    assert engine.held_blocks == REST_BLOCKS
    assert engine.word(EngineWord.MAP_FAILURES) == engine.word(EngineWord.CONSERVATION_FAILURES) == 0


@pytest.mark.parametrize("call", ["create", "map"])
@pytest.mark.parametrize("nth", [1, 2, 7, 20])
def test_a_refused_inflate_is_undone_on_every_rank_and_requests_wait(
    pair: ModellessEngine, call: str, nth: int
) -> None:
    """ENOMEM at any call of one rank: nothing of that move stays on either, no request fails, and it is asked again."""
    pair.set_limit(40)
    pair.vmms[1].plan.fail_at(call, nth, times=3)
    for number in range(4):
        pair.ask(f"r{number}", prompt=200, tokens=40)
    run_checked(pair)
    assert len(pair.finished) == 4
    assert pair.word(EngineWord.MAP_FAILURES) >= 1
    assert pair.vmms[0].held_bytes() == pair.vmms[1].held_bytes()
    assert pair.word(EngineWord.CONSERVATION_FAILURES) == 0


@pytest.mark.parametrize("call", ["unmap", "release"])
@pytest.mark.parametrize("nth", [1, 3, 8])
def test_memory_that_cannot_go_back_stays_on_the_board_until_it_has_gone(
    pair: ModellessEngine, call: str, nth: int
) -> None:
    """A refused deflate: what is still held still counts as committed, and the idle engine tries again until it has
    given everything back."""
    pair.set_limit(40)
    for number in range(4):
        pair.ask(f"r{number}", prompt=200, tokens=10)
    run_checked(pair)
    pair.vmms[1].plan.fail_at(call, nth, times=20)
    for _ in range(1500):
        pair.step()
        pair.check()
    assert pair.held_blocks == REST_BLOCKS
    assert pair.word(EngineWord.COMMITTED_BYTES) == pair.held_bytes
    assert pair.word(EngineWord.MAP_FAILURES) >= 1


def test_an_engine_that_cannot_give_back_does_not_spin(engine: ModellessEngine) -> None:
    """While the system refuses, an idle engine tries about twice a second."""
    engine.set_limit(40)
    engine.ask("r", prompt=400, tokens=2)
    engine.run()
    engine.vmms[0].plan.fail_at("unmap", 1, times=100_000)
    engine.settle(5.0)
    steps = engine.word(EngineWord.STEPS)
    engine.settle(10.0)
    assert 5 < engine.word(EngineWord.STEPS) - steps < 60


def test_a_machine_out_of_memory_for_long_ends_no_request(engine: ModellessEngine) -> None:
    """For three seconds every inflate is refused: the running request waits or is preempted, and then finishes."""
    engine.set_limit(40)
    engine.ask("r", prompt=64, tokens=200)
    engine.vmms[0].plan.fail_at("create", 20, times=100_000)
    for _ in range(300):
        engine.step()
        engine.check()
    assert engine.scheduler.has_unfinished_requests()
    engine.vmms[0].plan.clear()
    run_checked(engine)
    assert engine.finished == {"r"}


def test_an_imbalance_is_told_and_counted_and_ends_nothing(
    engine: ModellessEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A defect that a check of the books finds goes to the log and to the board; the engine goes on."""

    def broken() -> None:
        raise ContractViolation("the pool counts 7 bytes, the system 8")

    monkeypatch.setattr(engine.ranks[0], "check_conservation", broken)
    engine.set_limit(40)
    engine.vmms[0].plan.fail_at("map", 5)
    engine.ask("r", prompt=200, tokens=20)
    with caplog.at_level(logging.ERROR):
        engine.run()
    after_undo = engine.word(EngineWord.CONSERVATION_FAILURES)
    assert after_undo >= 1
    assert any("the pool counts 7 bytes" in line for line in caplog.messages)
    engine.settle()
    assert engine.word(EngineWord.CONSERVATION_FAILURES) > after_undo, "the idle shrink checks too"
    engine.ask("s", prompt=20, tokens=2)
    engine.run()
    assert engine.finished == {"r", "s"}


def test_a_worker_that_disagrees_with_the_scheduler_is_found(engine: ModellessEngine) -> None:
    """An extent that a worker holds and the scheduler does not know of is found when the engine next rests."""
    engine.set_limit(40)
    engine.ask("r", prompt=200, tokens=20)
    engine.run()
    engine.ranks[0].apply(KvMoves(sequence=0, map=[60]))
    assert engine.word(EngineWord.CONSERVATION_FAILURES) == 0
    engine.settle()
    assert engine.word(EngineWord.CONSERVATION_FAILURES) == 1


def test_the_longest_request_waits_for_a_lease_below_its_size_and_does_not_preempt_itself_for_ever(
    engine: ModellessEngine,
) -> None:
    """A lease below the guarantee, as while a stopped neighbour holds the bytes: the request takes what there is, is
    preempted a few times at most, computes nothing twice meanwhile, and finishes when the lease comes."""
    engine.set_limit(LONGEST_BLOCKS - 4)
    engine.ask("long", prompt=LONGEST_TOKENS - 250, tokens=250)
    for _ in range(2000):
        engine.step()
        engine.check()
    assert engine.scheduler.has_unfinished_requests()
    preemptions = engine.word(EngineWord.PREEMPTIONS)
    assert preemptions <= 2
    for _ in range(2000):
        engine.step()
    assert engine.word(EngineWord.PREEMPTIONS) == preemptions
    engine.set_limit(GUARANTEE_BLOCKS)
    run_checked(engine)
    assert engine.finished == {"long"}


def test_a_request_that_waits_for_its_lease_lets_smaller_ones_finish(engine: ModellessEngine) -> None:
    """Those that run go on; the one that does not fit stays at the head of the queue."""
    engine.set_limit(8)
    engine.ask("small", prompt=40, tokens=60)
    engine.step()
    engine.ask("long", prompt=LONGEST_TOKENS - 10, tokens=10)
    for _ in range(500):
        engine.step()
        engine.check()
    assert engine.finished == {"small"}
    engine.set_limit(GUARANTEE_BLOCKS)
    run_checked(engine)
    assert engine.finished == {"small", "long"}
