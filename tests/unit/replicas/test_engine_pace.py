"""How fast an engine says it is: steps between tokens, gaps of its answers, and what of it stands on the board."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams

from memory_agent.lease_board import EngineWord, LeaseBoard, ReplicaWord
from replicas.elastic_prefill import Objectives
from replicas.engine_pace import EnginePace
from replicas.hop import TPOT_TARGET_ARG, TTFT_TARGET_ARG
from replicas.measured_scheduler import own_objectives
from replicas.step_time import StepTime, StepWork
from tests.unit.replicas.modelless_engine import STEP_S, ModellessEngine, modelless_engine, modelless_spec

TRUE = StepTime(step_s=0.01, row_s=5e-4, kv_token_s=1e-6, token_s=1e-4)
NONE = Objectives(math.inf, math.inf)
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


def test_tpot_is_that_of_the_slow_answers() -> None:
    """One answer in ten exceeds it: of those that ended within five seconds, and of those that have eight tokens."""
    pace = EnginePace()
    assert pace.tpot_s(0.0) == 0.0
    for number in range(10):
        pace.answer(number, 1, 10.0)
        pace.answer(number, 2, 10.0 + 0.1 * (number + 1))
    assert pace.tpot_s(12.0) == 0.0, "three tokens say little before the end"
    for number in range(10):
        pace.forget(number)
    assert pace.tpot_s(12.0) == pytest.approx(0.45)
    pace.answer("long", 1, 12.0)
    pace.answer("long", 7, 19.0)
    assert pace.tpot_s(13.0) == pytest.approx(0.5)
    assert pace.tpot_s(16.1) == pytest.approx(1.0), "the others are old"


def test_objectives_come_and_go_with_their_requests() -> None:
    """The tightest TPOT of those that are here counts, twice the same one until both have gone."""
    pace = EnginePace()
    assert pace.tpot_target_s == math.inf
    for name, tpot_s in (("a", 0.2), ("b", 0.05), ("c", 0.05), ("d", math.inf)):
        pace.arrive(name, 10, Objectives(1.0, tpot_s), 0.0)
    pace.forget("b")
    assert pace.tpot_target_s == 0.05
    pace.forget("c")
    assert pace.tpot_target_s == 0.2
    pace.forget("a")
    assert pace.tpot_target_s == math.inf


def test_who_waits_longest_for_its_objective_counts() -> None:
    """Of the requests without a token, the one that has used most of its TTFT objective; who has a token waits no
    more."""
    pace = EnginePace()
    pace.arrive("patient", 10, Objectives(100.0, 1.0), 0.0)
    pace.arrive("hasty", 10, Objectives(2.0, 1.0), 9.0)
    pace.arrive("any", 10, Objectives(math.inf, 1.0), 0.0)
    assert pace.ttft_share(10.0) == 0.5
    pace.answer("hasty", 1, 10.0)
    assert pace.ttft_share(10.0) == 0.1
    pace.forget("patient")
    assert pace.ttft_share(10.0) == 0.0


def test_mean_prompt_follows_the_recent_ones() -> None:
    """The first prompt is the mean at once, later ones move it."""
    pace = EnginePace()
    pace.arrive("a", 1000, NONE, 0.0)
    assert pace.prompt_tokens == 1000
    for number in range(200):
        pace.arrive(number, 100, NONE, 0.0)
    assert pace.prompt_tokens == pytest.approx(100, rel=0.01)


def test_long_prompts_have_most_tokens() -> None:
    """One prompt in ten of a thousand tokens, the others of ten: a token is most likely in a long one."""
    pace = EnginePace()
    assert pace.prompt_of_token == 0.0
    for number in range(1000):
        pace.arrive(number, 10 if number % 10 else 1000, NONE, 0.0)
    assert 80 < pace.prompt_tokens < 150
    assert 850 < pace.prompt_of_token < 1000


def request_with(args: dict[str, Any] | None) -> Any:
    return SimpleNamespace(sampling_params=SamplingParams(extra_args=args))


@pytest.mark.parametrize("value", ["50", -1, 0, math.inf, math.nan, None, [50]])
def test_an_objective_that_is_no_time_is_none(value: Any) -> None:
    """Extra arguments come from clients too: what is no number of milliseconds is passed over."""
    default = Objectives(1.0, 2.0)
    assert own_objectives(request_with({TPOT_TARGET_ARG: value}), default) == default
    assert own_objectives(request_with({TTFT_TARGET_ARG: value, TPOT_TARGET_ARG: 50}), default) == Objectives(1.0, 0.05)
    assert own_objectives(request_with(None), default) == default
    pooling: Any = SimpleNamespace(sampling_params=None)
    assert own_objectives(pooling, default) == default


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
        assert not engine.scheduler.pace._answers and not engine.scheduler.pace._objectives


def test_a_request_that_was_given_up_is_forgotten(tmp_path: Path) -> None:
    """Its objective and its newest token go with it."""
    with modelless_engine(tmp_path, modelless_spec(tmp_path)) as engine:
        engine.ask("a", prompt=64, tokens=60)
        for _ in range(10):
            engine.step()
        engine.gone = {"a"}
        engine.settle(0.1)
        assert not engine.scheduler.pace._answers and not engine.scheduler.pace._objectives


def test_words_keep_floats_exactly(tmp_path: Path) -> None:
    """A float comes back from its 64-bit word as it was, also through another mapping."""
    row = LeaseBoard.create(tmp_path / "board", 1 << 30).row(0)
    other = LeaseBoard.open(tmp_path / "board").row(0)
    for value in (0.0, 1e-12, 0.1, 1e300, math.inf):
        row.set_float(EngineWord.TPOT_S, value)
        assert other.get_float(EngineWord.TPOT_S) == value


def test_an_engine_tells_what_its_requests_are_promised(tmp_path: Path) -> None:
    """The objectives of the settings, and tighter ones that a request brings."""
    spec = replace(modelless_spec(tmp_path), ttft_slo_ms=1000.0, tpot_slo_ms=100.0)
    with modelless_engine(tmp_path, spec) as engine:
        timed(engine)
        engine.ask("a", prompt=64, tokens=60)
        engine.step()
        assert floats(engine, EngineWord.TPOT_TARGET_S) == [0.1]
        engine.ask("b", prompt=64, tokens=30, objectives={TPOT_TARGET_ARG: 50, TTFT_TARGET_ARG: 20})
        engine.step()
        engine.step()
        assert floats(engine, EngineWord.TPOT_TARGET_S) == [0.05]
        engine.run()
        engine.settle(0.1)
        assert floats(engine, EngineWord.TPOT_TARGET_S, EngineWord.TTFT_SHARE) == [0.0, 0.0]


def test_a_short_prompt_does_not_wait_for_a_long_one_where_steps_are_short(tmp_path: Path) -> None:
    """With a target that makes steps short a prompt gets its fair share of them; without one the first takes all."""
    first_tokens: dict[int, dict[str, int]] = {}
    for budget in (0, 16):
        folder = tmp_path / str(budget)
        folder.mkdir()
        spec = replace(modelless_spec(folder), max_num_batched_tokens=32)
        with modelless_engine(folder, spec) as engine:
            engine.row.set(ReplicaWord.TOKEN_BUDGET_MAX, budget)
            engine.row.set(ReplicaWord.TARGET_REVISION, 1)
            engine.ask("long", prompt=300, tokens=2)
            engine.ask("short", prompt=8, tokens=2)
            engine.step()
            steps = first_tokens[budget] = {}
            for step in range(60):
                engine.step()
                for name in ("long", "short"):
                    if engine.tokens[name]:
                        steps.setdefault(name, step)
            engine.run()
            engine.check_tokens()
    assert first_tokens[0]["short"] >= first_tokens[0]["long"]
    assert first_tokens[16]["short"] < first_tokens[16]["long"] / 4


def test_the_rate_of_prompts_is_that_of_the_last_half_minute() -> None:
    """A steady rate is found; one that has stopped fades."""
    pace = EnginePace()
    assert pace.prompt_rate(0.0) == 0.0
    for second in range(200):
        pace.compute(500, float(second))
    assert pace.prompt_rate(199.0) == pytest.approx(500, rel=0.05)
    assert pace.prompt_rate(260.0) < 100
