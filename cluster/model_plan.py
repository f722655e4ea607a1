"""What to do next for a model: a pure function of what is meant and what is seen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from cluster.model_set import ModelEntry, ModelPhase


@dataclass(frozen=True)
class AppState:
    """A model's Serve application.

    Attributes:
        running: all its replicas are up; deleting: it is being removed; progress: its replicas, in words.
        failed: why it did not start, where that is so.
    """

    running: bool = False
    deleting: bool = False
    progress: str = ""
    failed: str | None = None


@dataclass(frozen=True)
class IngressState:
    """The models of one ingress process, by name.

    Attributes:
        routed: take requests; in_flight: requests of each model that it still has, routed or not.
        failed: models whose API could not be built, and why.
    """

    routed: frozenset[str] = frozenset()
    in_flight: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)


class Action(StrEnum):
    """What to ask of Ray Serve."""

    DEPLOY = "deploy"
    DELETE = "delete"


@dataclass(frozen=True)
class Step:
    """One step of a model's life.

    Attributes:
        action: to do first; phase: the model's next one, None where it is gone.
        failure: why the model has to leave, where it failed to start.
    """

    phase: ModelPhase | None
    action: Action | None = None
    failure: str | None = None


def next_step(entry: ModelEntry, app: AppState | None, ingresses: Sequence[IngressState]) -> Step:
    """The step to take now. app: None where Ray Serve has none of this model. ingresses: those that answered, all of
    them or none; without any nothing is concluded from their silence. Pure, and repeating a step does no harm."""
    phase = entry.phase
    if phase is ModelPhase.DRAINING:
        drained = bool(ingresses) and not any(entry.name in ingress.in_flight for ingress in ingresses)
        return Step(ModelPhase.LEAVING if drained else phase)
    if phase is ModelPhase.LEAVING:
        if app is None:
            return Step(None)
        return Step(phase, None if app.deleting else Action.DELETE)
    if app is None:
        return Step(ModelPhase.STARTING, Action.DEPLOY)
    if phase is ModelPhase.SERVING or app.deleting:
        return Step(phase)
    if failure := app.failed or next((one.failed[entry.name] for one in ingresses if entry.name in one.failed), None):
        return Step(ModelPhase.DRAINING, failure=failure)
    up = app.running and bool(ingresses) and all(entry.name in ingress.routed for ingress in ingresses)
    return Step(ModelPhase.SERVING if up else ModelPhase.STARTING)
