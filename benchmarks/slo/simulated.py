"""The same load on simulated replicas: what the controller's targets should be worth, before real engines say it."""

from typing import Any

import msgspec

from benchmarks.slo.load import MixedLoad, Shape
from benchmarks.slo.served import ENGINES, slo_classes
from cluster.simulator.arrivals import Arrival
from cluster.simulator.scenario import Scenario
from cluster.simulator.simulation import Simulation
from replicas.engine_profile import load_profile

_PROFILE = "smollm2-135m-cpu"


def simulate(seconds: float, turns: int, max_num_seqs: int, max_model_len: int) -> dict[str, Any]:
    """Attainment with and without targets, over all turns, by routing policy."""
    profile = msgspec.structs.replace(load_profile(_PROFILE), max_num_seqs=max_num_seqs, max_model_len=max_model_len)
    shape = Shape.of(profile.step_time, ENGINES)
    found: dict[str, Any] = {}
    for policy in ("predicted", "load"):
        for name in ("without", "with"):
            kept = of = 0
            for turn in range(turns):
                load = MixedLoad.made(shape, seconds, turn, seed=turn)
                arrivals = [
                    Arrival(request.arrival_s or 0.0, len(request.prompt), request.output_len, (), slo_class)
                    for request, slo_class in zip(load.work.requests, load.classes, strict=True)
                ]
                scenario = Scenario(
                    profile, ENGINES, policy, per_node=ENGINES, classes=slo_classes(shape), batch_sizing=name == "with"
                )
                total = Simulation(scenario, arrivals).run().account.total
                kept, of = kept + total.kept, of + total.counted
            found[f"{policy}, {name}"] = round(kept / of, 3)
    return found
