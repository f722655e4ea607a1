"""When memory moves: reclaimed at once, given back lazily and in one move, mapped ahead of a decode. No faults here."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from memory_agent.lease_board import EngineWord
from tests.unit.replicas.modelless_engine import BLOCK_BYTES, GUARANTEE_BLOCKS, ModellessEngine, modelless_engine


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[ModellessEngine]:
    with modelless_engine(tmp_path) as engine:
        yield engine


@pytest.mark.parametrize("blocks", [1, 5, GUARANTEE_BLOCKS, 30])
def test_a_reclaim_from_a_busy_engine_takes_one_step(engine: ModellessEngine, blocks: int) -> None:
    """However much it uses: free extents go first, then running requests are preempted; all of them finish later."""
    engine.set_limit(40)
    for number in range(6):
        engine.ask(f"r{number}", prompt=200, tokens=100)
    for _ in range(30):
        engine.step()
    assert engine.held_blocks > 30
    engine.set_limit(blocks)
    engine.step()
    assert engine.held_blocks <= max(blocks, 1)
    engine.check()
    engine.set_limit(GUARANTEE_BLOCKS)
    engine.run()
    assert len(engine.finished) == 6


def test_memory_of_a_finished_request_stays_until_it_is_wanted_and_then_goes_in_one_move(
    engine: ModellessEngine,
) -> None:
    """Unmapping is lazy and batched: no byte goes back while the engine works, all of it in one move when it must."""
    engine.set_limit(40)
    for number in range(6):
        engine.ask(f"r{number}", prompt=150, tokens=2 + number)
    engine.run()
    engine.ask("next", prompt=20, tokens=30)
    engine.run()
    assert engine.word(EngineWord.DEFLATE_COUNT) == 0
    before = engine.held_blocks
    assert before > 25
    engine.set_limit(5)
    engine.settle(0.1)
    assert engine.held_blocks <= 5
    assert engine.word(EngineWord.DEFLATE_COUNT) == 1
    assert engine.word(EngineWord.DEFLATE_BYTES) == (before - engine.held_blocks) * BLOCK_BYTES


def test_a_decode_never_waits_for_its_next_block(engine: ModellessEngine) -> None:
    """The next extent is mapped ahead: every step of a lone decode yields its token."""
    engine.set_limit(40)
    engine.ask("r", prompt=20, tokens=400)
    engine.settle(5 * 0.01)  # until the prompt has its memory
    before = engine.word(EngineWord.STEPS)
    engine.run()
    assert engine.word(EngineWord.STEPS) - before <= 400
    assert engine.word(EngineWord.PREEMPTIONS) == 0
