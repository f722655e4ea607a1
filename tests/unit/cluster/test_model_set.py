"""The set of models: what may be added, removed and limited, and that it survives as text."""

from dataclasses import replace

import pytest

from cluster.config import ModelConfig
from cluster.model_set import (
    Limits,
    ModelConflictError,
    ModelPhase,
    ModelSet,
    UnknownModelError,
    new_entry,
    set_from_json,
)
from cluster.sizing import GIB, MIB
from memory_agent.errors import SettingsError
from tests.unit.cluster.model_examples import LEAST, entry, spec


def two() -> ModelSet:
    return ModelSet((entry("a"), entry("b", replicas=1)), GIB)


def test_a_name_is_there_once() -> None:
    """The same name again is refused, with a remedy that fits whether it stays or is on its way out."""
    with pytest.raises(ModelConflictError, match=r"'a' is there already \(serving\).*--name"):
        two().admit(entry("a"), GIB)
    with pytest.raises(ModelConflictError, match="'a' is being removed; add it again when that is done"):
        two().withdraw("a").admit(entry("a"), GIB)


def test_the_board_has_room_for_so_many() -> None:
    """More elastic replicas than the lease board has rows are refused with how many fit; others do not count."""
    full = ModelSet((entry("a", replicas=30), entry("s", replicas=9, elastic=False)), GIB)
    with pytest.raises(ModelConflictError, match="2 more fit, 3 were asked for"):
        full.check_new(ModelConfig(name="c", replicas=3))
    full.check_new(ModelConfig(name="c", replicas=2))
    full.check_new(ModelConfig(name="c", replicas=3, elastic=False))


def test_the_last_serving_model_cannot_be_removed() -> None:
    """At least one other model must serve; one that only starts does not count."""
    alone = ModelSet((entry("a"),), GIB)
    starting = alone.admit(entry("b", ModelPhase.STARTING), GIB)
    for models in (alone, starting):
        with pytest.raises(ModelConflictError, match=r"no other model serves.*ellm models add"):
            models.withdraw("a")
    assert starting.withdraw("b").get("b").phase is ModelPhase.DRAINING


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    """Every command names the models there are."""
    for command in (
        lambda: two().withdraw("c"),
        lambda: two().limit("c", Limits(LEAST, GIB)),
        lambda: two().moved("c", ModelPhase.SERVING),
    ):
        with pytest.raises(UnknownModelError, match="its models are: a, b"):
            command()


def test_removing_twice_changes_nothing() -> None:
    """A model on its way out stays in the phase it has reached."""
    leaving = two().withdraw("a").moved("a", ModelPhase.LEAVING)
    assert leaving.withdraw("a") == leaving


@pytest.mark.parametrize(
    ("guarantee", "ceiling", "said"),
    [
        (LEAST - 1, GIB, "at least 64MiB fit"),
        (LEAST, 2 * GIB, "above the 1024MiB that all models of this device share"),
        (LEAST, 600 * MIB, "the 512MiB of addresses that its replicas reserved.*--ceiling"),
        (300 * MIB, 200 * MIB, "above its ceiling of 200MiB"),
        (481 * MIB, 512 * MIB, "64MiB are promised to others.*at most 480MiB fit"),
    ],
)
def test_limits_that_cannot_hold_are_refused(guarantee: int, ceiling: int, said: str) -> None:
    """Below one longest request, above the device, above the reserved addresses, crossed, beyond the budget: each with
    the number that would fit."""
    models = ModelSet((entry("a", kv_ceiling_bytes=512 * MIB), entry("b", replicas=1)), GIB)
    with pytest.raises(SettingsError, match=said):
        models.limit("a", Limits(guarantee, ceiling))
    assert models.limit("a", Limits(480 * MIB, 512 * MIB)).promised_bytes == GIB


def test_a_guarantee_leaves_room_for_a_start() -> None:
    """A replica that dies has to start again when all others have their guarantees: the largest start of any model is
    kept free, that of a static model is not."""
    models = ModelSet(
        (entry("a", spike_bytes=40 * MIB), entry("b", replicas=1), entry("s", elastic=False, spike_bytes=GIB)), GIB
    )
    assert (models.start_bytes, models.weights_bytes) == (40 * MIB, 900 * MIB)
    with pytest.raises(SettingsError, match="the start of an engine needs 40MiB; at most 460MiB fit"):
        models.limit("a", Limits(461 * MIB, GIB))
    models.limit("a", Limits(460 * MIB, GIB))


def test_a_static_model_has_no_limits() -> None:
    """What is not elastic cannot be limited while it runs; the remedy is said."""
    with pytest.raises(SettingsError, match=r"is not elastic.*remove it and add it again"):
        ModelSet((entry("a", elastic=False),), GIB).limit("a", Limits(LEAST, GIB))


def test_guarantees_are_promised_while_engines_live() -> None:
    """A model on its way out still counts, as its engines hold their guarantee until they are gone."""
    assert two().promised_bytes == two().withdraw("a").promised_bytes == 3 * LEAST
    assert two().without("a").promised_bytes == LEAST


def test_a_chosen_guarantee_becomes_a_limit() -> None:
    """Only what was chosen above the engine's own is a limit; the engines register with their own."""
    chosen = ModelConfig(name="a", guarantee=100 * MIB)
    assert new_entry(chosen, spec("a"), 100 * MIB).limits == Limits(100 * MIB, GIB)
    assert new_entry(ModelConfig(name="a"), spec("a"), LEAST).limits is None
    assert new_entry(replace_elastic(chosen), spec("a", elastic=False), 0).limits is None


def replace_elastic(config: ModelConfig) -> ModelConfig:
    return config.model_copy(update={"elastic": False})


def test_the_set_survives_as_text() -> None:
    """Every part of it comes back: settings, specs, limits, phases, budget."""
    models = two().limit("a", Limits(LEAST, GIB // 2)).withdraw("b")
    rich = entry("c", ModelPhase.STARTING, engine_args={"block_size": 32}, weight=2.5)
    models = models.admit(replace(rich, config=rich.config.model_copy(update={"guarantee": LEAST})), GIB)
    assert set_from_json(models.to_json()) == models
