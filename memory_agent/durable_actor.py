"""How this project's own actors are started: one of a name, outliving its starter and its own death."""

from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from memory_agent.controller_link import NAMESPACE


def ensure_actor(cls: type, name: str, node_id: str, *args: Any, soft: bool) -> ActorHandle[Any]:
    """The actor ``name``, started as ``cls(*args)`` where there is none. Does not wait for the start.

    node_id: Ray's id of the node it runs on; with ``soft`` only by preference. Ray restarts it after a death and runs
    unfinished calls again, so its methods must be idempotent.
    """
    options: dict[str, Any] = {
        "name": name,
        "namespace": NAMESPACE,
        "get_if_exists": True,
        "lifetime": "detached",
        "max_restarts": -1,
        "max_task_retries": -1,
        "num_cpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=soft),
    }
    actor: Any = ray.remote(cls)  # Ray's typing does not follow a class through ``ray.remote``
    handle: ActorHandle[Any] = actor.options(**options).remote(*args)
    return handle
