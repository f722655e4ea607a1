"""The engine model against a plain one that takes step by step, and its memory against what requests hold."""

import math
import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.decode_batch import EngineRequest
from replicas.engine_model import EngineModel
from replicas.engine_profile import EngineProfile, HostLink
from replicas.step_memory import Memory
from replicas.step_time import StepTime, StepWork, prompt_pairs
from replicas.targets import ReplicaTarget

BLOCK = 4
STEP = StepTime(step_s=0.01, row_s=1e-3, kv_token_s=1e-5, token_s=1e-3, pair_s=1e-6)


def profile(blocks: int = 200, elastic: bool = False, host_blocks: int = 0, token_bytes: float = 0.0) -> EngineProfile:
    """Blocks of 4 tokens and 100 bytes; steps of at most 16 tokens and 8 requests."""
    return EngineProfile(
        name="tiny",
        source="made up",
        step_time=STEP,
        memory=Memory(block_bytes=100, block_tokens=BLOCK, token_bytes=token_bytes, step_bytes=0.0),
        device_bytes=100 * (blocks + 1) + round(16 * token_bytes),
        weights_bytes=0,
        max_num_seqs=8,
        max_num_batched_tokens=16,
        max_model_len=BLOCK * blocks,
        elastic=elastic,
        host=HostLink(bytes=100 * host_blocks, bytes_per_s=1e9),
    )


@dataclass
class Load:
    """(seconds, prompt tokens, output tokens) of each request, in order of time."""

    requests: list[tuple[float, int, int]]

    def run(self, engine: EngineModel, prefixes: dict[int, tuple[int, ...]] | None = None) -> list[EngineRequest]:
        """All requests through an engine, its books checked after every run of steps."""
        made = [
            EngineRequest(at, prompt, output, (prefixes or {}).get(at, ()))
            for at, (_, prompt, output) in enumerate(self.requests)
        ]
        coming = 0
        while coming < len(made) or engine.next_event_s < math.inf:
            if coming < len(made) and self.requests[coming][0] <= engine.next_event_s:
                engine.submit(made[coming], self.requests[coming][0])
                coming += 1
            else:
                engine.advance()
            engine.check_conservation()
        return made


loads = st.lists(st.tuples(st.floats(1e-4, 0.3), st.integers(1, 60), st.integers(1, 30)), min_size=1, max_size=25).map(
    lambda gaps: Load([(sum(g[0] for g in gaps[: at + 1]), p, o) for at, (_, p, o) in enumerate(gaps)])
)


def step_by_step(load: Load, blocks: int) -> list[tuple[float, float]]:
    """(first token, end) of each request, by a scheduler that looks at everybody in every step."""
    count = len(load.requests)
    waiting: list[int] = []
    running: list[int] = []
    decoding: set[int] = set()
    computed, made = [0] * count, [0] * count
    first, end = [math.nan] * count, [math.nan] * count
    coming, now = 0, 0.0

    def known(one: int) -> int:
        return load.requests[one][1] + made[one]

    def held(ones: list[int]) -> int:
        return sum(-(-(known(one) - (one in decoding)) // BLOCK) for one in ones)

    while coming < count or waiting or running:
        if not waiting and not running:
            now = max(now, load.requests[coming][0])
        while coming < count and load.requests[coming][0] <= now:
            waiting.append(coming)
            coming += 1
        displaced = False
        while True:
            rows = [one for one in running if one in decoding]
            grown = sum(computed[one] % BLOCK == 0 for one in rows)
            if not rows or held(running) + grown <= blocks:
                break
            last = running.pop()
            decoding.discard(last)
            computed[last] = 0
            waiting.insert(0, last)
            displaced = True
        budget, chunks = 16 - len(rows), []
        for one in running:
            if one not in decoding and budget > 0:
                chunks.append((one, min(known(one) - computed[one], budget)))
                budget -= chunks[-1][1]
        while waiting and not displaced and budget > 0 and len(running) < 8:
            one = waiting[0]
            if held(running) + grown + -(-known(one) // BLOCK) > blocks:
                break
            running.append(waiting.pop(0))
            chunks.append((one, min(known(one), budget)))
            budget -= chunks[-1][1]
        pairs = sum(prompt_pairs(computed[one], tokens) for one, tokens in chunks)
        kv_tokens = sum(computed[one] for one in rows)
        now += STEP.seconds(StepWork(len(rows), kv_tokens, sum(tokens for _, tokens in chunks), pairs))
        for one, tokens in [*chunks, *((one, 1) for one in rows)]:
            computed[one] += tokens
            if computed[one] == known(one):
                made[one] += 1
                decoding.add(one)
                first[one] = now if made[one] == 1 else first[one]
                end[one] = now if made[one] == load.requests[one][2] else end[one]
        running = [one for one in running if math.isnan(end[one])]
    return list(zip(first, end, strict=True))


@given(loads, st.sampled_from([24, 60, 600]))
@settings(max_examples=150, deadline=None)
def test_many_steps_at_once_are_the_same_as_one_by_one(load: Load, blocks: int) -> None:
    """With room for everybody or for few, every first token and every end comes at the time at which a scheduler that
    takes step by step has it."""
    made = load.run(EngineModel(profile(blocks), prefix_block_tokens=BLOCK))
    for one, (first_s, end_s) in zip(made, step_by_step(load, blocks), strict=True):
        assert one.first_token_s == pytest.approx(first_s, abs=1e-9)
        assert one.finished_s == pytest.approx(end_s, abs=1e-9)


@given(loads, st.booleans(), st.integers(0, 40), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_scarce_memory_is_conserved_and_everybody_ends(load: Load, elastic: bool, host: int, shared: int) -> None:
    """With too little memory for all, elastic or static, with a host buffer or without, with shared prefixes or
    without, blocks are never lost or taken twice, and every request ends, its first token first."""
    engine = EngineModel(profile(24, elastic, host, token_bytes=10.0), prefix_block_tokens=2 * BLOCK)
    prefixes = {at: tuple(range(min(shared, prompt // (2 * BLOCK)))) for at, (_, prompt, _) in enumerate(load.requests)}
    for one in load.run(engine, prefixes):
        assert 0 <= one.first_token_s <= one.finished_s
    counts = engine.counts()
    assert (counts.running, counts.waiting, counts.used_blocks, counts.kv_tokens) == (0, 0, 0, 0)


def crowd(count: int, prompt: int = 20, output: int = 40) -> Load:
    return Load([(0.0, prompt, output)] * count)


def test_who_was_admitted_last_makes_way() -> None:
    """Where blocks run out the newest request is displaced, computed again, and ends after the older ones."""
    engine = EngineModel(profile(30), prefix_block_tokens=BLOCK)
    made = crowd(4).run(engine)
    assert engine.preemptions > 0
    assert made[0].preemptions == 0 and made[3].preemptions > 0
    assert made[0].finished_s == min(one.finished_s for one in made)


def test_the_host_buffer_spares_computing_again() -> None:
    """A displaced request is back sooner where its blocks are loaded than where they are computed."""
    ends = [
        max(one.finished_s for one in crowd(4).run(EngineModel(profile(30, host_blocks=host), BLOCK)))
        for host in (0, 100)
    ]
    assert ends[1] < ends[0]


def test_elastic_memory_holds_more_requests() -> None:
    """Of the same bytes the elastic engine makes more KV blocks, because it sets no large step aside."""
    static, elastic = (profile(20, elastic, token_bytes=100.0) for elastic in (False, True))
    assert elastic.kv_blocks == static.kv_blocks + 8  # 16 - 8 tokens of a step, a block's bytes each
    late = [max(one.finished_s for one in crowd(6).run(EngineModel(one, BLOCK))) for one in (static, elastic)]
    assert late[1] < late[0]


def test_a_known_prefix_is_not_computed_again() -> None:
    """The second of two equal prompts gets its first token sooner, and knows how much it was spared."""
    load = Load([(0.0, 40, 2), (1.0, 40, 2)])
    one, two = load.run(EngineModel(profile(), prefix_block_tokens=8), {0: (1, 2, 3, 4, 5), 1: (1, 2, 3, 4, 5)})
    assert (one.hit_tokens, two.hit_tokens) == (0, 32)  # the last block holds the prompt's last token, which is needed
    assert two.first_token_s - 1.0 < one.first_token_s


def test_a_request_that_never_fits_is_refused() -> None:
    """One longer than the engine's longest is an error that names both lengths."""
    with pytest.raises(ValueError, match=r"700 \+ 200 tokens are more than the engine's 800"):
        EngineModel(profile(), BLOCK).submit(EngineRequest(0, 700, 200), 0.0)


def test_targets_bound_requests_and_steps() -> None:
    """A target for two requests at once is kept; one below the running decodes' tokens does not stop them."""
    engine = EngineModel(profile(), BLOCK)
    engine.apply(ReplicaTarget(1, token_budget_max=1, active_max=2))
    for at in range(5):
        engine.submit(EngineRequest(at, 4, 10), 0.0)
    while engine.next_event_s < math.inf:
        assert engine.counts().running <= 2
        engine.advance()


def test_a_cancelled_request_leaves_nothing_behind() -> None:
    """Cancelled while it waits, computes or decodes, a request gives back all it had, and the others end."""
    rng = random.Random(5)
    engine = EngineModel(profile(60), BLOCK)
    made = [EngineRequest(at, rng.randrange(1, 60), rng.randrange(2, 60)) for at in range(12)]
    for one in made:
        engine.submit(one, 0.0)
    cancelled = set()
    while engine.next_event_s < math.inf:
        engine.advance()
        if len(cancelled) < 6:
            victim = rng.choice([one for one in made if one.finished_s < 0 and one.request_id not in cancelled])
            engine.cancel(victim)
            cancelled.add(victim.request_id)
        engine.check_conservation()
    assert engine.counts().used_blocks == 0
    assert {one.request_id for one in made if one.finished_s < 0} == cancelled


def test_a_dead_engine_returns_its_requests_and_starts_cold() -> None:
    """Whoever ran or waited is lost with it; the next life has no blocks and no cache."""
    engine = EngineModel(profile(), prefix_block_tokens=8)
    for at in range(12):
        engine.submit(EngineRequest(at, 30, 10, (1, 2, 3)), 0.0)
    engine.advance()
    assert {one.request_id for one in engine.drain()} == set(range(12))
    counts = engine.counts()
    assert (counts.used_blocks, counts.cached_blocks, engine.next_event_s) == (0, 0, math.inf)


def test_a_slow_engine_takes_longer() -> None:
    """A factor on its steps is a factor on everybody's times."""
    times = []
    for factor in (1.0, 3.0):
        engine = EngineModel(profile(), BLOCK)
        engine.slowness = factor
        times.append(max(one.finished_s for one in crowd(3).run(engine)))
    assert times[1] == pytest.approx(3 * times[0])
