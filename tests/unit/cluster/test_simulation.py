"""Whole simulated clusters: repeatable, conserving requests, and breaking as clusters do."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as replace_struct

from cluster.bench.errors import BenchError
from cluster.bench.traces import read_trace
from cluster.config import SloClass
from cluster.move import MoveOutcome
from cluster.simulator.arrivals import Arrival, Synthetic, labelled, synthetic_arrivals, trace_arrivals
from cluster.simulator.faults import Fault, FaultKind
from cluster.simulator.plan import fewest, make_plan
from cluster.simulator.result import SimulationResult
from cluster.simulator.scenario import Scenario
from cluster.simulator.sim_router import POLICIES
from cluster.simulator.simulation import Simulation
from cluster.slo import Ending
from replicas.engine_profile import load_profile

TRACES = Path(__file__).parents[4] / "shared" / "data" / "traces"
PROFILE = load_profile("llama-3.1-8b-h100")
CHAT = SloClass(name="chat", ttft_ms=500.0, tpot_ms=50.0)
SHAPE = Synthetic(requests=400, rate=30.0, burst_factor=3.0, prefix_tokens=1024, prefixes=5)


def arrivals(**changes: Any) -> list[Arrival]:
    return synthetic_arrivals(replace(SHAPE, **changes), 1, PROFILE.max_model_len)


def run(come: list[Arrival], replicas: int = 3, **settings: Any) -> SimulationResult:
    scenario = Scenario(PROFILE, replicas, **({"classes": [CHAT], "per_node": 2} | settings))
    return Simulation(scenario, come).run()


def endings(result: SimulationResult) -> dict[str, int]:
    return {str(ending): count for ending, count in result.account.total.endings.items() if count}


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_seed_gives_the_same_bytes(policy: str) -> None:
    """With every policy two runs of one scenario write the same JSON, requests included."""
    one, two = (
        json.dumps(run(arrivals(), policy=policy, routers=2, migration=True).to_json(records=True)) for _ in range(2)
    )
    assert one == two


def test_another_seed_gives_other_arrivals() -> None:
    """The seed is what arrivals follow from."""
    made = [synthetic_arrivals(SHAPE, seed, PROFILE.max_model_len) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]


def test_made_up_requests_have_the_shape_that_was_asked_for() -> None:
    """The rate is kept over the whole, half of the requests share a prefix, bursts are denser than the rest."""
    come = arrivals(requests=4000, prefix_share=0.5)
    assert len(come) / come[-1].at_s == pytest.approx(30.0, rel=0.15)
    assert sum(bool(one.prefix) for one in come) / 4000 == pytest.approx(0.5, abs=0.05)
    seconds = Counter(int(one.at_s) for one in come)
    assert max(seconds.values()) > 2 * 4000 / come[-1].at_s


def test_an_easy_load_keeps_every_target() -> None:
    """With room everybody is answered in time, and predictions are near what came."""
    result = run(arrivals(rate=10.0))
    assert endings(result) == {"answered": 400}
    assert result.account.total.attainment == 1.0
    assert result.ttft_error.median < 0.25 and result.tpot_error.median < 0.25


fault_plans = st.lists(
    st.builds(
        Fault,
        kind=st.sampled_from(FaultKind),
        target=st.integers(0, 1),
        at_s=st.floats(0, 12),
        lasts_s=st.floats(0.1, 8),
        factor=st.just(5.0),
    ),
    max_size=5,
)


@given(fault_plans, st.sampled_from(["predicted", "load", "round-robin"]), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_every_request_ends_once_whatever_breaks(
    faults: list[Fault], policy: str, admission: bool, sizing: bool, small: bool
) -> None:
    """Replicas, nodes, agents and networks may fail in any order, and requests move between them: no request is lost or
    counted twice."""
    come = arrivals(requests=150)
    profile = replace_struct(PROFILE, device_bytes=PROFILE.device_bytes // 12, max_model_len=8192) if small else PROFILE
    settings = {"faults": faults, "policy": policy, "admission": admission, "batch_sizing": sizing, "per_node": 2}
    result = Simulation(Scenario(profile, 3, classes=[CHAT], migration=True, **settings), come).run()
    assert result.account.total.endings.total() == 150
    assert sorted(row.number for row in result.rows) == list(range(150))


def test_moving_evens_out_what_routing_could_not_foresee() -> None:
    """Of answers whose length nobody knows, in turn on replicas with little memory: fewer preemptions, fewer late first
    tokens, no request moved for nothing, and hardly any more than once."""
    shape = Synthetic(requests=1200, rate=20.0, prompt_tokens=512, output_tokens=400, spread=1.3)
    profile = replace_struct(PROFILE, device_bytes=PROFILE.device_bytes // 10, max_model_len=8192)
    come = synthetic_arrivals(shape, 1, profile.max_model_len)
    stay, move = (
        Simulation(Scenario(profile, 8, "round-robin", classes=[CHAT], migration=migration), come).run()
        for migration in (False, True)
    )
    assert not stay.moves and endings(stay) == endings(move) == {"answered": 1200}
    assert move.preemptions < stay.preemptions / 2
    late = [result.latencies()["ttft"].percentiles_ms[99.0] for result in (stay, move)]
    assert late[1] < late[0] / 2
    went = {outcome: sum(n for (_, one), n in move.moves.items() if one is outcome) for outcome in MoveOutcome}
    assert went[MoveOutcome.MOVED] + went[MoveOutcome.REROUTED] < 1200 / 8
    assert went[MoveOutcome.FAILED] <= 0.05 * went[MoveOutcome.MOVED]
    assert move.account.total.attainment > stay.account.total.attainment


def test_a_replica_that_dies_fails_its_streams_and_no_others() -> None:
    """Requests with a token end with an error, those without go elsewhere, and those that come later are answered."""
    come = arrivals(rate=20.0)
    result = run(come, faults=[Fault(FaultKind.REPLICA, 0, 5.0, 10.0)])
    failed = [row for row in result.rows if row.ending is Ending.FAILED]
    assert 0 < len(failed) < 60
    assert all(row.at_s <= 5.0 for row in failed)
    assert endings(result)["answered"] == 400 - len(failed)


def test_agents_that_die_hurt_nobody_while_others_report() -> None:
    """An agent's death makes its replicas look saturated; the others take the load, and no request fails."""
    result = run(arrivals(rate=10.0), replicas=4, faults=[Fault(FaultKind.AGENT, 0, 2.0, 30.0)])
    assert endings(result) == {"answered": 400}
    shares = {name: tally.counted for name, tally in result.account.by_replica.items()}
    assert shares["replica-00000"] + shares["replica-00001"] < 0.4 * 400


def test_a_cut_off_node_is_left_out_and_taken_back() -> None:
    """Streams stall while the network is away and go on afterwards; new requests are tried elsewhere."""
    result = run(arrivals(rate=10.0), replicas=4, faults=[Fault(FaultKind.PARTITION, 0, 5.0, 10.0)])
    late = [row for row in result.rows if row.at_s > 18.0]
    assert endings(result)["answered"] >= 390
    assert all(row.kept for row in late)


def test_a_slow_replica_gets_less() -> None:
    """One whose steps take five times as long is given fewer requests than the others, by what its reports show."""
    result = run(arrivals(rate=20.0), faults=[Fault(FaultKind.SLOW, 0, 0.0, 1000.0, factor=5.0)])
    shares = {name: tally.counted for name, tally in result.account.by_replica.items()}
    assert shares["replica-00000"] < min(shares["replica-00001"], shares["replica-00002"])


def test_a_deadline_ends_a_request() -> None:
    """With a deadline that many cannot make, these are cancelled and count as misses."""
    hurried = SloClass(name="chat", ttft_ms=500.0, tpot_ms=50.0, deadline_ms=3000.0)
    result = run(arrivals(rate=60.0), replicas=1, classes=[hurried])
    found = endings(result)
    assert found["timed_out"] > 50 and found["answered"] + found["timed_out"] == 400
    assert max(row.latency_s for row in result.answered) <= 3.01


def test_admission_keeps_interactive_goodput_under_overload() -> None:
    """At three times the load the interactive class's goodput is at least nine tenths of that at capacity, and the
    other
    class is not starved."""
    classes = [
        SloClass(name="interactive", ttft_ms=500.0, tpot_ms=40.0, weight=10.0),
        SloClass(name="batch", ttft_ms=20_000.0, tpot_ms=100.0),
    ]
    goodput = {}
    for factor in (1, 3):
        shape = Synthetic(requests=900 * factor, rate=30.0 * factor, prompt_tokens=1000)
        come = synthetic_arrivals(shape, 3, PROFILE.max_model_len)
        come = labelled(come, {"interactive": 0.3, "batch": 0.7}, tenants=3, seed=3)
        result = run(come, replicas=2, classes=classes, admission=True, batch_sizing=True)
        tallies = result.account.by_class
        goodput[factor] = tallies["interactive"].kept / come[-1].at_s
        assert tallies["batch"].kept > 0
    assert goodput[3] >= 0.9 * goodput[1]


def test_scaling_follows_a_load_that_grows() -> None:
    """A burst that two replicas cannot hold brings more, and attainment with them."""
    come = arrivals(requests=4000, rate=40.0, burst_factor=1.0)
    fixed = run(come, replicas=2)
    scaled = run(come, replicas=2, scaling=True, replicas_most=10, start_s=5.0)
    assert max(sample.replicas for sample in scaled.samples) > 2
    assert scaled.account.total.attainment > fixed.account.total.attainment + 0.2


def test_memory_by_owner_stays_inside_the_devices() -> None:
    """KV memory in use, kept, and activations never exceed what the replicas' devices have."""
    for elastic in (True, False):
        profile = load_profile("smollm2-135m-cpu")
        small = replace_profile(profile, elastic)
        come = synthetic_arrivals(Synthetic(200, 2.0, prompt_tokens=400, output_tokens=50), 1, small.max_model_len)
        result = Simulation(Scenario(small, 2), come).run()
        for one in result.samples:
            assert one.kv_used_bytes + one.kv_cached_bytes + one.activation_bytes <= one.device_bytes


def replace_profile(profile: Any, elastic: bool) -> Any:
    import msgspec

    return msgspec.structs.replace(profile, elastic=elastic)


def test_a_trace_keeps_its_prefixes_and_is_cut_to_the_engine(tmp_path: Path) -> None:
    """Whole blocks stay shared, longer requests are cut, and times are scaled to the rate."""
    line = {"timestamp": 0, "input_length": 1100, "output_length": 9, "hash_ids": [7, 8, 9]}
    rows = [line, line | {"timestamp": 4000, "input_length": 1500}]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    made = trace_arrivals(read_trace(path), max_model_len=1200, rate=0.5)
    assert [one.prefix for one in made] == [(7, 8), (7, 8)]
    assert [(one.at_s, one.prompt_tokens, one.output_tokens) for one in made] == [(0.0, 1100, 9), (2.0, 1191, 9)]


@pytest.mark.parametrize("name", ["azure_2023_conv.csv", "mooncake_conversation.jsonl"])
def test_published_traces_run(name: str) -> None:
    """Requests of the real traces are answered, and Mooncake's shared blocks are found again."""
    if not (TRACES / name).exists():
        pytest.skip(f"{name} is not at hand")
    come = trace_arrivals(read_trace(TRACES / name, 200), PROFILE.max_model_len)
    result = run(come, replicas=8)
    assert endings(result) == {"answered": 200}
    assert (result.hit_share > 0.02) == name.startswith("mooncake")


def test_a_plan_finds_the_fewest_replicas() -> None:
    """The cluster that is found reaches the goal, and none of the simulated ones with fewer replicas does."""
    plan = make_plan(Scenario(PROFILE, 1, classes=[CHAT]), arrivals(rate=40.0), 0.95, 16, step_tokens=[2048])
    assert plan.best is not None and plan.best.attainment >= 0.95
    assert all(one.attainment < 0.95 for one in plan.points if one.replicas < plan.best.replicas)
    assert {one.elastic for one in plan.points} == {True, False}


@given(st.integers(1, 200), st.integers(1, 200))
def test_the_search_finds_the_first_that_reaches(first: int, most: int) -> None:
    """Of a rising yes, the first; none where the most is not enough."""
    assert fewest(lambda count: count >= first, most) == (first if first <= most else None)


def test_a_plan_without_an_answer_has_none() -> None:
    """Targets that nobody meets leave the curve and no best point."""
    impossible = SloClass(ttft_ms=0.001)
    plan = make_plan(Scenario(PROFILE, 1, classes=[impossible]), arrivals(requests=50), 0.99, 2, step_tokens=[2048])
    assert plan.best is None and len(plan.points) == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("replica:3", "give KIND:NUMBER@SECONDS"),
        ("disk:0@1+2", "one of replica, node"),
        ("slow:0@1+2", "slow with a factor"),
        ("replica:0@1+2x4", "slow with a factor"),
    ],
)
def test_a_fault_that_is_none_is_refused(text: str, words: str) -> None:
    """The error says how faults are written."""
    with pytest.raises(BenchError, match=words):
        Fault.parse(text)


def test_a_fault_of_nobody_is_refused() -> None:
    """A replica or a node that does not exist cannot fail."""
    with pytest.raises(BenchError, match="there are 2 nodes, from 0"):
        run(arrivals(), faults=[Fault.parse("node:5@1+2")])
