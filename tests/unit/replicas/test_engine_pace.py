"""How fast an engine says it is: steps between tokens, gaps of its answers, and what of it stands on the board."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams

from memory_agent.lease_board import EngineWord, LeaseBoard
from replicas.engine_pace import EnginePace
from replicas.hop import TPOT_TARGET_ARG
from replicas.measured_scheduler import tpot_target_s
from replicas.step_time import StepTime, StepWork
from tests.unit.replicas.modelless_engine import STEP_S, ModellessEngine, modelless_engine, modelless_spec

TRUE = StepTime(step_s=0.01, row_s=5e-4, kv_token_s=1e-6, token_s=1e-4)
WORKS = [StepWork(rows, rows * 100, tokens) for rows in (1, 4, 16) for tokens in (0, 64, 256)]


def run(pace: EnginePace, works: list[StepWork], ahead: int, now_s: float = 0.0) -> float:
    """Steps one after the other, of which ``ahead`` are scheduled before the first one's tokens; when they end."""
    for work in works[:ahead]:
        pace.begin(now_s, work)
    for at, work in enumerate(works):
        if not ahead:
            pace.begin(now_s, work)
        elif at + ahead < len(works):
            pace.begin(now_s, works[at + ahead])
        now_s += TRUE.seconds(work)
        pace.end(now_s)
        # With steps ahead, the last requests end while steps of theirs are in flight.
        pace.rest(busy=at + 1 + ahead < len(works))
    return now_s


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_steps_are_learned_however_early_they_are_scheduled(ahead: int) -> None:
    """With synchronous scheduling and with steps scheduled ahead, the model is that of the steps."""
    pace = EnginePace()
    run(pace, WORKS * 40, ahead)
    assert pace.step_time is not None
    for work in WORKS:
        assert pace.step_time.seconds(work) == pytest.approx(TRUE.seconds(work), rel=0.02)


@pytest.mark.parametrize("ahead", [0, 1])
def test_pauses_are_no_part_of_a_step(ahead: int) -> None:
    """An engine that is idle for a minute after every few steps learns the same."""
    pace = EnginePace()
    now_s = 0.0
    for _ in range(30):
        now_s = run(pace, WORKS, ahead, now_s + 60.0)
    assert pace.step_time is not None
    assert pace.step_time.seconds(WORKS[0]) == pytest.approx(TRUE.seconds(WORKS[0]), rel=0.05)


def test_empty_steps_teach_nothing() -> None:
    """A step that waits for memory computes nothing, and its time is nobody's."""
    pace = EnginePace()
    works = [step for work in WORKS for step in (work, StepWork())] * 40
    now_s = 0.0
    for work in works:
        pace.begin(now_s, work)
        now_s += TRUE.seconds(work) if work.rows else 5.0
        pace.end(now_s)
        pace.rest(busy=True)
    assert pace.step_time is not None
    assert pace.step_time.seconds(WORKS[0]) == pytest.approx(TRUE.seconds(WORKS[0]), rel=0.02)


def test_few_steps_are_not_told() -> None:
    """What some steps have shown is not passed on yet."""
    pace = EnginePace()
    run(pace, WORKS, 0)
    assert pace.step_time is None


def test_tpot_is_the_gap_between_tokens_lately() -> None:
    """First tokens count for nothing, several at once for as many; old gaps are forgotten, an ended request too."""
    pace = EnginePace()
    assert pace.tpot_s == 0.0
    pace.answer("a", 1, 10.0)
    pace.answer("b", 1, 10.0)
    assert pace.tpot_s == 0.0
    pace.answer("a", 1, 10.1)
    pace.answer("b", 2, 10.3)
    assert pace.tpot_s == pytest.approx((0.1 + 0.3) / 3, rel=0.05)
    pace.forget("b")
    pace.answer("b", 1, 99.0)
    now_s = 10.1
    for _ in range(200):
        now_s += 0.05
        pace.answer("a", 1, now_s)
    assert pace.tpot_s == pytest.approx(0.05, rel=0.05)


def test_the_tightest_objective_of_those_here_counts() -> None:
    """It comes and goes with its request; 0 where none has one."""
    pace = EnginePace()
    pace.arrive("a", 10, 0.2)
    pace.arrive("b", 10, 0.05)
    pace.arrive("c", 10, None)
    assert pace.tpot_target_s == 0.05
    pace.forget("b")
    assert pace.tpot_target_s == 0.2
    pace.forget("a")
    assert pace.tpot_target_s == 0.0


def test_mean_prompt_follows_the_recent_ones() -> None:
    """The first prompt is the mean at once, later ones move it."""
    pace = EnginePace()
    pace.arrive("a", 1000, None)
    assert pace.prompt_tokens == 1000
    for number in range(200):
        pace.arrive(str(number), 100, None)
    assert pace.prompt_tokens == pytest.approx(100, rel=0.01)


@pytest.mark.parametrize("value", ["50", -1, 0, math.inf, math.nan, None, [50]])
def test_an_objective_that_is_no_time_is_none(value: Any) -> None:
    """Extra arguments come from clients too: what is no number of milliseconds is passed over."""
    request: Any = SimpleNamespace(sampling_params=SamplingParams(extra_args={TPOT_TARGET_ARG: value}))
    assert tpot_target_s(request) is None
    assert tpot_target_s(SimpleNamespace(sampling_params=None)) is None  # type: ignore[arg-type]  # a pooling request


def timed(engine: ModellessEngine) -> ModellessEngine:
    """Its steps take STEP_S of the simulated clock."""
    engine.scheduler.now_s = engine.clock  # type: ignore[method-assign]
    return engine


def floats(engine: ModellessEngine, *words: EngineWord) -> list[float]:
    return [engine.row.get_float(word) for word in words]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_engine_puts_its_pace_on_the_board(tmp_path: Path, asynchronous: bool) -> None:
    """A real scheduler measures its steps, the gaps of its answers and its prompts, with either kind of scheduling; and
    tells its own limits before its first step."""
    spec = replace(modelless_spec(tmp_path), async_scheduling=asynchronous)
    with modelless_engine(tmp_path, spec) as engine:
        timed(engine)
        limits = [engine.word(word) for word in (EngineWord.MAX_NUM_SEQS, EngineWord.MAX_NUM_BATCHED_TOKENS)]
        assert limits == [spec.max_num_seqs, spec.max_num_batched_tokens]
        engine.ask("a", prompt=64, tokens=60)
        engine.ask("b", prompt=32, tokens=60)
        for _ in range(40):
            engine.step()
        running_tokens = engine.word(EngineWord.KV_TOKENS)
        assert 96 + 2 * 30 < running_tokens < 96 + 2 * 45
        engine.run()
        engine.settle(0.1)
        [tpot_s, prompt] = floats(engine, EngineWord.TPOT_S, EngineWord.PROMPT_TOKENS)
        assert tpot_s == pytest.approx(STEP_S, rel=0.01)
        assert 32 < prompt < 64
        step_time = StepTime(*floats(engine, *(EngineWord.STEP_S + at for at in range(5))))  # type: ignore[arg-type]
        assert step_time.seconds(StepWork(2, 2 * 80)) == pytest.approx(STEP_S, rel=0.05)
        assert engine.word(EngineWord.KV_TOKENS) == 0
        assert not engine.scheduler.pace._newest_s


def test_a_request_that_was_given_up_is_forgotten(tmp_path: Path) -> None:
    """Its objective and its newest token go with it."""
    with modelless_engine(tmp_path, modelless_spec(tmp_path)) as engine:
        engine.ask("a", prompt=64, tokens=60)
        for _ in range(10):
            engine.step()
        engine.gone = {"a"}
        engine.settle(0.1)
        assert not engine.scheduler.pace._newest_s


def test_words_keep_floats_exactly(tmp_path: Path) -> None:
    """A float comes back from its 64-bit word as it was, also through another mapping."""
    row = LeaseBoard.create(tmp_path / "board", 1 << 30).row(0)
    other = LeaseBoard.open(tmp_path / "board").row(0)
    for value in (0.0, 1e-12, 0.1, 1e300, math.inf):
        row.set_float(EngineWord.TPOT_S, value)
        assert other.get_float(EngineWord.TPOT_S) == value
