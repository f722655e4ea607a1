"""The cluster under load, its API as a target, and the controller's targets switched on and off."""

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import ray

from benchmarks.slo.load import BATCH, INTERACTIVE, Shape
from cluster.bench.openai_target import OpenAITarget, ServerOptions
from cluster.bench.target import Chunk, Usage
from cluster.bench.workload import Request
from cluster.config import ClusterConfig, HttpConfig, MemoryConfig, ModelConfig, SloClass
from cluster.controller import ensure_controller
from cluster.slo import CLASS_HEADER, TPOT_HEADER, TTFT_HEADER
from cluster.target_planner import TargetSettings, step_time_of
from memory_agent.controller_link import CONTROLLER_NAME, NAMESPACE
from memory_agent.reports import EngineReport
from replicas.hop import TPOT_TARGET_ARG, TTFT_TARGET_ARG
from replicas.step_time import StepTime

ENGINES = 2
MAX_NUM_SEQS, MAX_MODEL_LEN = 16, 4096
_WEIGHTS = {INTERACTIVE: 10.0, BATCH: 1.0}
_TIMEOUT_S = 60.0


def cluster_config(port: int, shape: Shape) -> ClusterConfig:
    """Two replicas of the default model that share this machine, and the classes of the load."""
    return ClusterConfig(
        models=[ModelConfig(replicas=ENGINES, max_model_len=MAX_MODEL_LEN, max_num_seqs=MAX_NUM_SEQS)],
        memory=MemoryConfig(budget=1 << 30),
        http=HttpConfig(port=port),
        slo=slo_classes(shape),
    )


def slo_classes(shape: Shape) -> list[SloClass]:
    """Short requests go first where there are too many."""
    return [
        SloClass(name=name, ttft_ms=slo.ttft_ms or 0.0, tpot_ms=slo.tpot_ms or 0.0, weight=_WEIGHTS[name])
        for name, slo in shape.targets.items()
    ]


def switch_targets(on: bool) -> None:
    """Put another controller in the place of the present one: with the same bounds, and with batch sizing or not.
    Returns when every replica has a target of the new one."""
    old: Any = ray.get_actor(CONTROLLER_NAME, NAMESPACE)
    before = _applied(ray.get(old.snapshot.remote(), timeout=_TIMEOUT_S))
    ray.kill(old, no_restart=True)
    deadline = time.monotonic() + _TIMEOUT_S
    while _is_named() and time.monotonic() < deadline:
        time.sleep(0.1)
    new: Any = ensure_controller(TargetSettings(batch_sizing=on))
    while time.monotonic() < deadline:
        applied = _applied(ray.get(new.snapshot.remote(), timeout=_TIMEOUT_S))
        if len(applied) == ENGINES and all(applied[one] > before.get(one, 0) for one in applied):
            return
        time.sleep(0.25)
    raise TimeoutError(f"the replicas have no target of the new controller after {_TIMEOUT_S:.0f} s")


def decisions(count: int = 1000) -> list[dict[str, Any]]:
    """The controller's last ones."""
    controller: Any = ray.get_actor(CONTROLLER_NAME, NAMESPACE)
    found: list[dict[str, Any]] = ray.get(controller.decisions.remote(count), timeout=_TIMEOUT_S)
    return found


def learned_step_time() -> StepTime:
    """Of the slower engine. Raises RuntimeError where one has not learned it yet."""
    controller: Any = ray.get_actor(CONTROLLER_NAME, NAMESPACE)
    replicas = _replicas(ray.get(controller.snapshot.remote(), timeout=_TIMEOUT_S))
    names = set(EngineReport.__dataclass_fields__)
    reports = [EngineReport(**{key: value for key, value in one.items() if key in names}) for one in replicas]
    found = [step_time for report in reports if (step_time := step_time_of(report)) is not None]
    if len(found) < ENGINES:
        raise RuntimeError(f"{len(found)} of {ENGINES} engines know their step time: warm them up for longer")
    return max(found, key=lambda one: one.decode_s(1, 100))


@asynccontextmanager
async def api_target(url: str, shape: Shape, classes: Sequence[str]) -> AsyncIterator["ClassTarget"]:
    """The API, each request with its class and targets."""
    async with AsyncExitStack() as stack:
        targets = {
            name: await stack.enter_async_context(
                OpenAITarget(
                    ServerOptions(
                        url,
                        headers={
                            CLASS_HEADER: name,
                            TTFT_HEADER: f"{slo.ttft_ms:.3f}",
                            TPOT_HEADER: f"{slo.tpot_ms:.3f}",
                        },
                        extra_body={"vllm_xargs": {TTFT_TARGET_ARG: slo.ttft_ms, TPOT_TARGET_ARG: slo.tpot_ms}},
                    )
                )
            )
            for name, slo in shape.targets.items()
        }
        yield ClassTarget(targets, classes)


class ClassTarget:
    """Each request goes to the target of its class."""

    def __init__(self, targets: Mapping[str, OpenAITarget], classes: Sequence[str]) -> None:
        self._targets, self._classes = targets, classes

    def stream(self, request: Request) -> AsyncIterator[Chunk | Usage]:
        return self._targets[self._classes[request.index]].stream(request)


def _replicas(snapshot: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for node in snapshot["nodes"] for device in node["devices"] for one in device["replicas"]]


def _applied(snapshot: dict[str, Any]) -> dict[str, int]:
    return {one["engine_id"]: one["target_revision"] for one in _replicas(snapshot)}


def _is_named() -> bool:
    try:
        ray.get_actor(CONTROLLER_NAME, NAMESPACE)
    except ValueError:
        return False
    return True
