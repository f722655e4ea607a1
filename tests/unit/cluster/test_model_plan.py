"""The life of a model, step by step: what is done for what is seen."""

import pytest

from cluster.model_plan import Action, AppState, IngressState, Step, next_step
from cluster.model_set import ModelPhase
from tests.unit.cluster.model_examples import entry

UP, DOWN = AppState(running=True), AppState()
ROUTED, EMPTY = IngressState(routed=frozenset({"a"}), in_flight={"a": 0}), IngressState()
P = ModelPhase


@pytest.mark.parametrize(
    ("phase", "app", "ingresses", "step"),
    [
        (P.ADMITTED, None, [], Step(P.STARTING, Action.DEPLOY)),
        (P.ADMITTED, DOWN, [], Step(P.STARTING)),
        (P.STARTING, DOWN, [ROUTED], Step(P.STARTING)),
        (P.STARTING, UP, [], Step(P.STARTING)),
        (P.STARTING, UP, [ROUTED, EMPTY], Step(P.STARTING)),
        (P.STARTING, UP, [ROUTED, ROUTED], Step(P.SERVING)),
        (P.STARTING, None, [], Step(P.STARTING, Action.DEPLOY)),
        (P.STARTING, AppState(deleting=True), [], Step(P.STARTING)),
        (P.STARTING, AppState(failed="no memory"), [], Step(P.DRAINING, failure="no memory")),
        (P.STARTING, UP, [ROUTED, IngressState(failed={"a": "no parser"})], Step(P.DRAINING, failure="no parser")),
        (P.SERVING, UP, [EMPTY], Step(P.SERVING)),
        (P.SERVING, AppState(failed="unhealthy"), [ROUTED], Step(P.SERVING)),
        (P.SERVING, None, [ROUTED], Step(P.STARTING, Action.DEPLOY)),
        (P.DRAINING, UP, [], Step(P.DRAINING)),
        (P.DRAINING, UP, [EMPTY, IngressState(in_flight={"a": 3})], Step(P.DRAINING)),
        (P.DRAINING, UP, [IngressState(in_flight={"a": 0})], Step(P.DRAINING)),
        (P.DRAINING, UP, [EMPTY, IngressState(in_flight={"b": 3})], Step(P.LEAVING)),
        (P.LEAVING, UP, [], Step(P.LEAVING, Action.DELETE)),
        (P.LEAVING, AppState(deleting=True), [], Step(P.LEAVING)),
        (P.LEAVING, None, [], Step(None)),
    ],
)
def test_each_step(phase: ModelPhase, app: AppState | None, ingresses: list[IngressState], step: Step) -> None:
    """A model is deployed where it is missing, serves when every ingress routes it, leaves when none has it any more;
    silence of the ingresses decides nothing, and a serving model is never given up for its state."""
    assert next_step(entry("a", phase), app, ingresses) == step
