"""The load of the SLO benchmark."""

import math

import pytest

from benchmarks.slo.load import BATCH, INTERACTIVE, MixedLoad, Shape
from cluster.bench.report import LoadReport, RequestRecord
from replicas.step_time import StepTime

STEP = StepTime(step_s=0.03, row_s=1e-3, kv_token_s=3e-6, token_s=1.2e-3, pair_s=1e-6)
SHAPE = Shape.of(STEP, engines=2)


def test_turns_have_the_same_shape_and_other_prompts() -> None:
    """Times, lengths and classes are equal, and no prompt begins as one of another turn."""
    one, two = (MixedLoad.made(SHAPE, 300.0, turn) for turn in (1, 2))
    shapes = [[(r.arrival_s, len(r.prompt), r.output_len) for r in load.work.requests] for load in (one, two)]
    assert shapes[0] == shapes[1] and one.classes == two.classes
    beginnings = [{tuple(r.prompt[:16]) for r in load.work.requests} for load in (one, two)]
    assert not beginnings[0] & beginnings[1]


def test_rates_are_those_of_the_shape_and_grow_by_the_factor() -> None:
    """Over a long time each class comes at its rate; documents come in clumps."""
    for factor in (1.0, 3.0):
        load = MixedLoad.made(SHAPE, 3000.0, 1, factor)
        for name in (INTERACTIVE, BATCH):
            assert load.classes.count(name) == pytest.approx(3000 * factor * SHAPE.rates[name], rel=0.2)
    times = [r.arrival_s for r, name in zip(load.work.requests, load.classes, strict=True) if name == BATCH]
    assert len(set(times)) * 2 == len(times)


def test_a_slower_machine_gets_a_lighter_load_with_looser_targets() -> None:
    """Twice the step time: half of the rates, twice the targets of short requests."""
    slower = Shape.of(StepTime(*(2 * part for part in STEP.parts)), engines=2)
    for name in (INTERACTIVE, BATCH):
        assert slower.rates[name] == pytest.approx(SHAPE.rates[name] / 2)
    assert slower.targets[INTERACTIVE].tpot_ms == pytest.approx(2 * (SHAPE.targets[INTERACTIVE].tpot_ms or 0.0))


def test_who_kept_the_targets_of_its_class() -> None:
    """Each request is held against its own class; one that failed kept nothing."""
    load = MixedLoad.made(SHAPE, 100.0, 1)
    records = []
    for request in load.work.requests:
        record = RequestRecord(request.index, 0.0, 0.0, 10, 2, False, output_tokens=2)
        record.ttft_s, record.latency_s = 10.0, 10.1
        records.append(record)
    records[load.classes.index(BATCH)].error = "refused"
    report = LoadReport({}, 100.0, 1, records, None, ())
    kept = load.kept(report, SHAPE)
    documents = load.classes.count(BATCH)
    assert kept == {INTERACTIVE: (0, load.classes.count(INTERACTIVE)), BATCH: (documents - 1, documents)}
    assert math.isclose(sum(of for _, of in kept.values()), len(load.classes))
