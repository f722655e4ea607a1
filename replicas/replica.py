"""One engine replica: the Serve deployment around an engine.

    ingress --EngineCoreRequest--> generate() --> EngineHost
    ingress <--EngineCoreOutput--- one output channel an ingress, for all its requests

The engine's death is the replica's death: the process ends at once, so that its calls fail where the ingress can
send them elsewhere, no router sends it another request, and Ray Serve starts a new one.

vLLM is imported when a replica starts, not before: the process that only deploys replicas does without.
"""

import asyncio
import logging
import os
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.util import get_node_ip_address

from replicas.board_link import BoardLink
from replicas.replica_demand import QueueBook
from replicas.spec import EngineSpec
from replicas.vllm_plugin import own_engine_processes

if TYPE_CHECKING:
    from vllm.v1.metrics.stats import SchedulerStats

    from memory_agent.agent import AgentSpec
    from replicas.answer_journal import Found, Mark
    from replicas.channel_wire import InboxAddress
    from replicas.hop import Frames

logger = logging.getLogger("ray.serve")

ENGINE_DEAD_EXIT_CODE = 70


@dataclass(frozen=True)
class ReplicaInfo:
    """What an ingress needs to know of an engine before it can serve its API.

    Attributes:
        kv_blocks: KV blocks of the engine, the ceiling where the KV memory is elastic; block_tokens: tokens of one.
    """

    supported_tasks: tuple[str, ...]
    max_model_len: int
    kv_blocks: int
    block_tokens: int


@dataclass(frozen=True)
class ReplicaStats:
    """A replica's numbers now.

    Attributes:
        streams: requests that the replica has accepted and not finished.
        draining: it is to get no request while there are others; node_id, node_ip: where it runs, as Ray says.
        agent: name of the memory agent there; "" for an engine without a lease.
        scheduler: gauges of the engine's last step; its counts are those since the last call, so each is told once.
    """

    engine_id: str
    pid: int
    streams: int
    scheduler: "SchedulerStats"
    draining: bool = False
    node_id: str = ""
    node_ip: str = ""
    agent: str = ""


class EngineReplica:
    """The engine of one Serve replica. Construction loads the model and returns when the engine can run requests."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, spec: EngineSpec, agent_spec: "AgentSpec | None" = None
    ) -> None:
        """Must run on the event loop that will serve requests, as Ray Serve does it.

        Args:
            agent_spec: names the memory agent of this device; None runs the engine without a lease.

        Raises what vLLM raises for settings it refuses, and what the agent raises where the guarantee does not fit.
        """
        from memory_agent.agent import agent_name
        from replicas.answer_journal import AnswerJournal
        from replicas.engine_config import build_paced_core, build_vllm_config
        from replicas.engine_host import EngineHost
        from replicas.output_channel import Channels
        from replicas.warm_up import warm_up

        own_engine_processes()
        self.engine_id: str = serve.get_replica_context().replica_id.unique_id
        self._closing = self._draining = False
        node_id, agent = ray.get_runtime_context().get_node_id(), ""
        if agent_spec is not None:
            agent = agent_name(node_id, agent_spec.device)
        self._node = node_id, get_node_ip_address(), agent  # type: ignore[no-untyped-call]
        self._tasks: list[asyncio.Task[None]] = []
        self._link = BoardLink(self.engine_id, spec, agent_spec) if agent_spec is not None else None
        where = (self._link.registration.board_path, self._link.registration.row) if self._link is not None else ()
        config = build_vllm_config(spec, *where)
        self._engine = EngineHost(config, build_paced_core(spec, config))
        self._channels = Channels(self.engine_id, self._engine.run)
        self._journal = AnswerJournal(self.engine_id)
        self._queues = QueueBook()
        self._start(self._engine.pump())
        if self._link is not None:
            self._start(self._link.follow_lease(self._engine.wake))
            self._start(self._link.follow_targets())
        if spec.charge_activations:
            await warm_up(self._engine)

    async def generate(
        self,
        frames: "Frames",
        address: "InboxAddress",
        ticket: int,
        route: None = None,
        mark: "Mark | None" = None,
    ) -> None:
        """Run one encoded EngineCoreRequest; its outputs go to the inbox at ``address``, under ``ticket``. Returns when
        all have been received there. Cancelling aborts it in the engine.

        Args:
            route: what the caller tells the router of its process; it arrives here as None.
            mark: under which the answer is remembered, of a request that has a key.

        Raises ChannelBroken where the inbox cannot be reached.
        """
        with self._channels.lane(address, ticket) as lane, self._journal.recorded(mark, lane) as outlet:
            await self._engine.run(frames, outlet)

    async def find_answer(self, key: bytes, request: bytes) -> "Found | None":
        """Asked by an ingress to which a key has come: what is known of its answer. An attempt at it whose own ingress
        is gone ends with this."""
        return self._journal.find(key, request)

    async def info(self) -> ReplicaInfo:
        config = self._engine.config
        return ReplicaInfo(
            supported_tasks=await self._engine.supported_tasks(),
            max_model_len=config.model_config.max_model_len,
            kv_blocks=config.cache_config.num_gpu_blocks or 0,
            block_tokens=config.cache_config.block_size or 0,
        )

    async def stats(self, ingress: str, queued: int) -> ReplicaStats:
        """Asked by every ingress about once a second; ``queued``: requests that wait there for any replica."""
        self._queues.tell(ingress, queued, time.monotonic())
        streams, numbers = self._engine.streams, self._engine.take_stats()
        return ReplicaStats(self.engine_id, os.getpid(), streams, numbers, self._draining, *self._node)

    async def drain(self, replicas: Sequence[str], on: bool) -> str:
        """Told to every replica: those of these ids drain, or do not any more. Ingresses see it with the next stats,
        send nothing to one that drains, and move what is there. Returns the replica's own id."""
        if self.engine_id in replicas:
            self._draining = on
        return self.engine_id

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve every second where the number of replicas changes: ``ReplicaDemand``, by name."""
        demand = self._engine.demand()
        if self._link is not None:
            demand = replace(demand, **self._link.engine_words())
        return replace(demand, queued=self._queues.total(time.monotonic())).to_stats()

    async def check_health(self) -> None:
        """Called by Ray Serve: raises where the engine is dead, which replaces the replica."""
        if self._engine.dead:
            raise RuntimeError(f"the engine of replica {self.engine_id} is dead")

    def __del__(self) -> None:
        """Ray Serve's destructor: end the engine's processes and give the lease back."""
        self._closing = True
        for task in getattr(self, "_tasks", ()):
            task.cancel()
        if (channels := getattr(self, "_channels", None)) is not None:
            channels.close()
        if (engine := getattr(self, "_engine", None)) is not None:
            engine.close()
        if (link := getattr(self, "_link", None)) is not None:
            link.close()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(self._on_task_end)
        self._tasks.append(task)

    def _on_task_end(self, task: "asyncio.Task[None]") -> None:
        """None of the tasks ends while the engine lives, so an end is the engine's, or a fault that must not go on
        unseen."""
        if self._closing or task.cancelled():
            return
        logger.critical("engine %s is gone; its replica ends with it", self.engine_id, exc_info=task.exception())
        logging.shutdown()
        os._exit(ENGINE_DEAD_EXIT_CODE)
