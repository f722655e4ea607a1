"""One more model beside those that run: what it is given, and refusals whose remedies work."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.addition import Room, plan_addition
from cluster.config import ClusterConfig, ModelConfig
from cluster.models import ModelFacts
from cluster.sizing import GIB, MIB
from memory_agent.errors import SettingsError

TOKEN_BYTES = 23040


def facts(max_model_len: int = 2048, weights_bytes: int = 269 * MIB) -> ModelFacts:
    return ModelFacts(Path("/m"), "bfloat16", max_model_len, weights_bytes, TOKEN_BYTES, 24_000, 480_000)


def room(free_bytes: int = 24 * GIB, **sizes: int) -> Room:
    known = {"pending_bytes": 0, "held_bytes": 100 * MIB, "guaranteed_bytes": 400 * MIB}
    known |= {"start_bytes": 0, "budget_bytes": GIB}
    return Room(free_bytes, **(known | sizes))


def model(**tree: object) -> ModelConfig:
    return ModelConfig.model_validate({"name": "new", "replicas": 1} | tree)


def test_a_model_that_fits_the_budget_leaves_it() -> None:
    """The running engines' budget has room for one longest request more, so nobody's memory changes."""
    addition = plan_addition(ClusterConfig(), model(), facts(), room())
    assert addition.budget_bytes == GIB
    assert addition.guarantee_bytes >= (2048 + 256) * TOKEN_BYTES
    assert addition.spec.kv_ceiling_bytes <= GIB


def test_a_budget_that_was_left_to_the_cluster_grows() -> None:
    """Guarantees that do not fit make an automatic budget grow, to twice what they need where that is free."""
    tight = room(guaranteed_bytes=GIB)
    addition = plan_addition(ClusterConfig(), model(), facts(), tight)
    assert addition.budget_bytes == pytest.approx(2 * (GIB + addition.guarantee_bytes), abs=MIB)
    fixed = ClusterConfig.model_validate({"memory": {"budget": "1GiB"}})
    with pytest.raises(SettingsError, match=r"memory\.budget is 1024MiB, of which 1024MiB are promised"):
        plan_addition(fixed, model(), facts(), tight)


def test_what_is_lent_counts_as_taken() -> None:
    """Free memory that running engines may still take of the budget, or that engines on their way need, is not free."""
    needs = 2 * GIB
    plan_addition(ClusterConfig(), model(), facts(), room(needs + GIB, held_bytes=0))
    plan_addition(ClusterConfig(), model(), facts(), room(needs, held_bytes=GIB))
    for short in (room(needs, held_bytes=0), room(needs + GIB, held_bytes=0, pending_bytes=GIB)):
        with pytest.raises(SettingsError, match="too little memory for new"):
            plan_addition(ClusterConfig(), model(), facts(), short)


@given(
    replicas=st.integers(1, 5),
    max_model_len=st.integers(512, 200_000),
    free_bytes=st.integers(GIB, 12 * GIB),
    guaranteed=st.integers(0, GIB),
    start_bytes=st.sampled_from([0, 500 * MIB]),
    budget=st.none() | st.just(GIB),
)
def test_promises_hold_and_remedies_work(
    replicas: int, max_model_len: int, free_bytes: int, guaranteed: int, start_bytes: int, budget: int | None
) -> None:
    """Whatever is asked for: either everything promised is there, or the replicas and the length that the refusal names
    would fit."""
    config = ClusterConfig.model_validate({"memory": {"budget": budget}})
    there = room(free_bytes, guaranteed_bytes=guaranteed, held_bytes=0, start_bytes=start_bytes)

    def plan(replicas: int, max_model_len: int) -> None:
        addition = plan_addition(config, model(replicas=replicas), facts(max_model_len), there)
        start = max(there.start_bytes, addition.spec.spike_bytes)
        assert guaranteed + replicas * addition.guarantee_bytes + start <= addition.budget_bytes
        fixed = replicas * (3 * GIB // 2 + 269 * MIB)
        assert fixed + addition.budget_bytes <= free_bytes
        assert addition.budget_bytes == GIB or budget is None

    try:
        plan(replicas, max_model_len)
    except SettingsError as error:
        if "too small to be elastic" in str(error):
            return
        if fewer := re.search(r"set replicas to (\d+)", str(error)):
            plan(int(fewer[1]), max_model_len)
            assert int(fewer[1]) < replicas
        if shorter := re.search(r"max_model_len to at most (\d+)", str(error)):
            plan(replicas, int(shorter[1]))
        assert fewer or shorter or re.search("remove (another model|it)", str(error))


def test_a_model_that_is_not_elastic_stays_outside_the_budget() -> None:
    """Its KV memory is held all the time beside the budget, which does not change."""
    asked = model(elastic=False, kv_ceiling="500MiB")
    addition = plan_addition(ClusterConfig(), asked, facts(), room(guaranteed_bytes=GIB))
    assert (addition.budget_bytes, addition.guarantee_bytes) == (GIB, 0)
    with pytest.raises(SettingsError, match="too little memory"):
        plan_addition(ClusterConfig(), asked, facts(), room(3 * GIB))


def test_the_first_elastic_model_makes_a_budget() -> None:
    """Where no engine was elastic there is no budget yet; the new model gets one as a new cluster would."""
    none = room(held_bytes=0, guaranteed_bytes=0, budget_bytes=0)
    assert plan_addition(ClusterConfig(), model(), facts(), none).budget_bytes == GIB


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"guarantee": "1MiB"}, "one longest request needs"),
        ({"guarantee": "600MiB", "kv_ceiling": "500MiB"}, "more than its kv_ceiling"),
        ({"guarantee": "100MiB", "elastic": False}, "elastic is false"),
        ({"kv_ceiling": "3GiB"}, "more than the budget"),
    ],
)
def test_limits_that_cannot_hold_are_refused(tree: dict[str, object], said: str) -> None:
    """A guarantee below one longest request, above the ceiling or of static memory; a ceiling above the budget."""
    with pytest.raises(SettingsError, match=said):
        plan_addition(ClusterConfig(), model(**tree), facts(), room())


def test_a_chosen_guarantee_is_promised() -> None:
    """A guarantee above one longest request is what each replica is promised."""
    assert plan_addition(ClusterConfig(), model(guarantee="200MiB"), facts(), room()).guarantee_bytes == 200 * MIB
