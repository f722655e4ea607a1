"""How many replicas, and which split of their memory, meet the targets: a search over simulations.

A replica's bytes beside the weights are split between KV memory and the activations of its largest step: large steps
compute prompts faster, and leave a static engine less KV memory. An elastic engine has no split to choose, only a
bound on its steps. For each split the fewest replicas that reach the goal are found by doubling, then by halving the
gap.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import msgspec

from cluster.bench.errors import BenchError
from cluster.simulator.arrivals import Arrival
from cluster.simulator.scenario import Scenario
from cluster.simulator.simulation import Simulation
from replicas.engine_profile import EngineProfile

STEP_TOKENS = (1024, 2048, 4096, 8192)

OnPoint = Callable[["Point"], None]


@dataclass(frozen=True)
class Point:
    """One simulated cluster.

    Attributes:
        step_tokens: most of a step; kv_tokens: that a replica then holds at most.
        goodput: requests a second that kept their targets.
    """

    elastic: bool
    step_tokens: int
    kv_tokens: int
    replicas: int
    attainment: float
    goodput: float
    p99_ttft_ms: float
    p99_tpot_ms: float


@dataclass(frozen=True)
class Plan:
    """Attributes:
    goal: attainment that is asked for.
    points: all that were simulated, by split and replicas.
    best: the fewest replicas that reach the goal, of those the highest attainment; None where none does.
    """

    goal: float
    points: Sequence[Point]

    @property
    def best(self) -> Point | None:
        reached = [one for one in self.points if one.attainment >= self.goal]
        return min(reached, key=lambda one: (one.replicas, -one.attainment), default=None)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; what was not measured is None."""
        best = self.best
        return {
            "goal": self.goal,
            "best": None if best is None else _point_json(best),
            "points": [_point_json(one) for one in self.points],
        }


def splits(profile: EngineProfile, step_tokens: Sequence[int], longest_tokens: int) -> list[EngineProfile]:
    """Static and elastic engines of these largest steps that can hold a request of ``longest_tokens``. Raises
    BenchError
    where there is none."""
    found = []
    for elastic in (False, True):
        for tokens in step_tokens:
            most = max(tokens, 1)
            one = msgspec.structs.replace(
                profile,
                elastic=elastic,
                max_num_batched_tokens=most,
                max_num_seqs=min(profile.max_num_seqs, most),
            )
            if one.kv_tokens >= longest_tokens:
                found.append(one)
    if not found:
        raise BenchError(
            f"{profile.name} holds no request of {longest_tokens} tokens beside a step of {min(step_tokens)}: shorter "
            "requests, smaller steps or another --gpu fit"
        )
    return found


def make_plan(
    scenario: Scenario,
    arrivals: Sequence[Arrival],
    goal: float,
    most: int,
    step_tokens: Sequence[int] = STEP_TOKENS,
    on_point: OnPoint | None = None,
) -> Plan:
    """Search up to ``most`` replicas. ``scenario`` says everything else. Raises BenchError."""
    if not 0 < goal <= 1:
        raise BenchError(f"--attainment {goal:g} does not fit: give a share above 0, at most 1, such as 0.99")
    if most < 1:
        raise BenchError(f"--max-replicas {most} is too small: give at least 1")
    longest = max(one.prompt_tokens + one.output_tokens for one in arrivals)
    points: list[Point] = []
    for profile in splits(scenario.profile, step_tokens, longest):
        tried: dict[int, Point] = {}

        def reaches(replicas: int, profile: EngineProfile = profile, tried: dict[int, Point] = tried) -> bool:
            if replicas not in tried:
                tried[replicas] = _simulated(replace(scenario, profile=profile, replicas=replicas), arrivals)
                if on_point is not None:
                    on_point(tried[replicas])
            return tried[replicas].attainment >= goal

        fewest(reaches, most)
        points += [tried[replicas] for replicas in sorted(tried)]
    return Plan(goal, points)


def fewest(reaches: Callable[[int], bool], most: int) -> int | None:
    """The smallest number from 1 to ``most`` that reaches; None where ``most`` does not. More must never reach less."""
    high = 1
    while not reaches(high):
        if high == most:
            return None
        high = min(2 * high, most)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


def _simulated(scenario: Scenario, arrivals: Sequence[Arrival]) -> Point:
    result = Simulation(scenario, arrivals).run()
    latencies = result.latencies()
    return Point(
        elastic=scenario.profile.elastic,
        step_tokens=scenario.profile.max_num_batched_tokens,
        kv_tokens=scenario.profile.kv_tokens,
        replicas=scenario.replicas,
        attainment=result.account.total.attainment,
        goodput=result.account.total.kept / result.duration_s,
        p99_ttft_ms=latencies["ttft"].percentiles_ms[99.0],
        p99_tpot_ms=latencies["tpot"].percentiles_ms[99.0],
    )


def _point_json(point: Point) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value for key, value in asdict(point).items()
    }
