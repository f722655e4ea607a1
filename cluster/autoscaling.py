"""The autoscaling policy of a model's deployment: Ray Serve's controller calls it, ``cluster.scaling`` decides.

    EngineReplica.record_autoscaling_stats --every second--> Ray Serve's controller --> DemandPolicy --> replicas
      with what ingresses have told it of their queues
    ingress handles: requests that wait for a replica -------->

Ray Serve ships this module to its controller by value: keep module state out of it. The first replica of a model that
has none is started by Ray Serve itself, as soon as a request waits for one.
"""

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError
from ray.serve.config import AutoscalingContext

from cluster.decision import Decision
from cluster.scaling import (
    Demand,
    ScalingDecision,
    ScalingSettings,
    ScalingState,
    decide_by_requests,
    decide_scale,
)
from memory_agent.controller_link import CONTROLLER_NAME, NAMESPACE
from replicas.replica_demand import ReplicaDemand, demand_of
from replicas.step_time import StepTime

logger = logging.getLogger("ray.serve")

_DECIDE_EVERY_S = 1.0


class DemandPolicy:
    """Of one model. Ray Serve calls it ten times a second; it looks once a second."""

    def __init__(self, model: str, tpot_target_s: float, calm_s: float, requests: int) -> None:
        """
        Args:
            tpot_target_s: of the class that most requests are in; calm_s: fewer replicas are enough for so long before
                one ends.
            requests: that a replica runs at once.
        """
        self._model, self._tpot_target_s, self._calm_s, self._requests = model, tpot_target_s, calm_s, requests
        self._state = ScalingState()
        self._decided_s = float("-inf")

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """How many replicas there should be, those that start included."""
        return self.decide(ctx, time.monotonic()), {}

    def decide(self, ctx: AutoscalingContext, now_s: float) -> int:
        """Likewise; what is decided stays ``ctx.target_num_replicas`` until the next look."""
        replicas = ctx.target_num_replicas
        if now_s - self._decided_s < _DECIDE_EVERY_S:
            return replicas
        self._decided_s = now_s
        engines = replica_demands(ctx.aggregated_metrics or {})
        queued = (ctx.total_queued_requests or 0.0) + max((one.queued for one in engines), default=0.0)
        asked = queued + sum(one.running + one.waiting for one in engines) > 0
        settings = ScalingSettings(
            least=max(ctx.capacity_adjusted_min_replicas, int(asked)),
            most=ctx.capacity_adjusted_max_replicas,
            tpot_target_s=self._tpot_target_s,
            kv_tokens=0,
            calm_s=self._calm_s,
        )
        decision = self._decided(engines, queued, replicas, settings, now_s)
        wanted = decision.replicas
        if wanted < replicas and ctx.current_num_replicas < replicas:
            self._state = ScalingState(self._state.seen)  # some start: what they are for has not been seen yet
            wanted = replicas
        if wanted != replicas:
            logger.info("scaling %s from %d to %d replicas: %s", self._model, replicas, wanted, decision.reason)
            inputs = {"replicas": replicas, "running": ctx.current_num_replicas, "queued": queued}
            record(Decision("scale", self._model, f"{wanted} replicas", decision.reason, inputs))
        return wanted

    def _decided(
        self, engines: list[ReplicaDemand], queued: float, replicas: int, settings: ScalingSettings, now_s: float
    ) -> ScalingDecision:
        step_time = _mean_step_time(engines)
        if step_time is None:
            requests = queued + sum(one.running + one.waiting for one in engines)
            self._state, decision = decide_by_requests(self._state, requests, self._requests, replicas, settings, now_s)
            return decision
        demand = total_demand(engines, queued, step_time)
        self._state, decision = decide_scale(self._state, demand, replicas, step_time, settings, now_s)
        return decision


def record(decision: Decision) -> None:
    """Tell the controller, without waiting for it."""
    threading.Thread(target=_tell, args=(decision,), name="record-decision", daemon=True).start()


def _tell(decision: Decision) -> None:
    try:
        controller: Any = ray.get_actor(CONTROLLER_NAME, namespace=NAMESPACE)
        controller.record.remote(decision)
    except (ValueError, RayError) as error:
        logger.info("the controller is away, the log alone has the decision: %s", error)


def replica_demands(stats: Mapping[str, Mapping[Any, float]]) -> list[ReplicaDemand]:
    """Of each replica, from numbers by name and replica, as Ray Serve has them."""
    replicas = {replica for values in stats.values() for replica in values}
    return [
        demand_of({name: values[replica] for name, values in stats.items() if replica in values})
        for replica in replicas
    ]


def total_demand(engines: list[ReplicaDemand], queued: float, step_time: StepTime) -> Demand:
    """Of all replicas, and of ``queued`` requests that have none yet and are taken to be like the others."""
    prompts = sum(one.request_rate for one in engines)
    running, waiting = sum(one.running for one in engines), sum(one.waiting for one in engines)
    prompt_rate, kv_tokens = sum(one.prompt_rate for one in engines), sum(one.kv_tokens for one in engines)
    prompt_tokens = prompt_rate / prompts if prompts else 0.0
    return Demand(
        prompt_rate=prompt_rate,
        output_rate=sum(one.output_rate for one in engines),
        context_tokens=kv_tokens / running if running >= 1 else prompt_tokens,
        kv_tokens=kv_tokens,
        waiting_s=(waiting + queued) * (prompt_tokens * step_time.token_s),
    )


def _mean_step_time(engines: list[ReplicaDemand]) -> StepTime | None:
    """Of those that know theirs."""
    parts = [one.step_time.parts for one in engines if one.step_time is not None]
    return StepTime(*(float(part) for part in np.mean(parts, axis=0))) if parts else None
