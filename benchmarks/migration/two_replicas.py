"""Two real engines of one model, with the cluster's relays and output channels between them and no Ray."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from cluster.core_client import ClusterCore
from cluster.route import Route, Standing
from memory_agent.lease_board import AgentWord, Lease, LeaseBoard, RowState
from replicas.channel_wire import InboxAddress
from replicas.engine_config import build_vllm_config
from replicas.engine_host import EngineHost
from replicas.environment import engine_environment, environment
from replicas.hop import Frames
from replicas.output_channel import Channels
from replicas.replica import ReplicaInfo, ReplicaStats
from replicas.spec import EngineSpec
from replicas.vllm_plugin import own_engine_processes

DEADLINE_S = 300.0


class Replica:
    """An engine with its channels: what a Serve replica has."""

    def __init__(self, name: str, spec: EngineSpec, board: Path, row: int) -> None:
        self.name = name
        self.engine = EngineHost(build_vllm_config(spec, str(board), row))
        self.channels = Channels(name, self.engine.run)
        self.pump = asyncio.get_running_loop().create_task(self.engine.pump())

    async def generate(self, frames: Frames, address: InboxAddress, ticket: int) -> None:
        with self.channels.lane(address, ticket) as lane:
            await self.engine.run(frames, lane)

    def close(self) -> None:
        self.pump.cancel()
        self.channels.close()
        self.engine.close()


class Handle:
    """A Ray Serve handle over replicas in this process: the route's wish, else ``first``."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self.replicas = {replica.name: replica for replica in replicas}
        self.first = next(iter(self.replicas))

    def options(self, *, method_name: str) -> "Handle":
        assert method_name == "generate"
        return self

    def remote(
        self, frames: Frames, address: InboxAddress, ticket: int, route: Route, mark: None
    ) -> "asyncio.Task[None]":
        replica = self.replicas[route.to or self.first]
        route.replica = Standing(replica.name)
        return asyncio.get_running_loop().create_task(replica.generate(frames, address, ticket))

    def broadcast(self, method: str, ingress: str, queued: int) -> "Handle":
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        return [
            ReplicaStats(one.name, 1, one.engine.streams, one.engine.take_stats()) for one in self.replicas.values()
        ]


@asynccontextmanager
async def two_replicas(spec: EngineSpec, folder: Path) -> AsyncIterator[tuple[ClusterCore, Handle]]:
    """Replicas "a" and "b" of one model on one board, and the core that relays to them. New requests go to
    "a", unless the handle is told otherwise."""
    own_engine_processes()
    board = LeaseBoard.create(folder / "board", 2 * spec.ceiling_bytes)
    async with AsyncExitStack() as stack:
        replicas = []
        with environment(engine_environment(spec, 2)):
            for index, name in enumerate("ab"):
                row = board.row(index)
                row.name(name, spec.model_name)
                row.set(AgentWord.LEASE, Lease(spec.ceiling_bytes, 1).pack())
                row.set(AgentWord.STATE, RowState.STARTING)
                replicas.append(Replica(name, spec, folder / "board", index))
                stack.callback(replicas[-1].close)
        handle = Handle(replicas)
        config = replicas[0].engine.config
        info = ReplicaInfo(
            ("generate",),
            spec.max_model_len,
            config.cache_config.num_gpu_blocks or 0,
            config.cache_config.block_size or 0,
        )
        core = ClusterCore(spec.model_name, handle, info, replicas=2, replica_limit=16)  # type: ignore[arg-type]
        stack.callback(core.shutdown)
        await core.open("127.0.0.1")
        async with asyncio.timeout(30):
            while len(core.replica_numbers) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        yield core, handle


class Streams:
    """Requests through a core, and what has come of each.

    Attributes:
        times: of each token, on the monotonic clock.
    """

    def __init__(self, core: ClusterCore) -> None:
        self.core = core
        self.tokens: dict[str, list[int]] = {}
        self.times: dict[str, list[float]] = {}
        self.ended: dict[str, Any] = {}
        self._news = asyncio.Condition()
        self._reader = asyncio.get_running_loop().create_task(self._read())

    async def ask(self, request_id: str, prompt: Sequence[int], tokens: int, salt: str | None = None) -> None:
        """Begin a greedy answer of so many tokens."""
        self.tokens[request_id], self.times[request_id] = [], []
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        await self.core.add_request_async(
            EngineCoreRequest(
                request_id=request_id,
                prompt_token_ids=list(prompt),
                mm_features=None,
                sampling_params=params,
                pooling_params=None,
                arrival_time=0.0,
                lora_request=None,
                cache_salt=salt,
                data_parallel_rank=None,
            )
        )

    async def end(self, request_id: str) -> None:
        """Its client has gone."""
        await self.core.abort_requests_async([request_id])
        self.ended[request_id] = None

    async def until(self, request_id: str, tokens: int) -> None:
        async with self._news, asyncio.timeout(DEADLINE_S):
            await self._news.wait_for(lambda: len(self.tokens[request_id]) >= tokens or request_id in self.ended)

    async def all_ended(self) -> None:
        async with self._news, asyncio.timeout(DEADLINE_S):
            await self._news.wait_for(lambda: len(self.ended) == len(self.tokens))
        self._reader.cancel()

    async def _read(self) -> None:
        while True:
            outputs = await self.core.get_output_async()
            async with self._news:
                for one in outputs.outputs:
                    if one.request_id in self.ended:
                        assert self.ended[one.request_id] is None
                        continue
                    self.tokens[one.request_id] += one.new_token_ids
                    self.times[one.request_id] += [time.monotonic()] * len(one.new_token_ids)
                    if one.finished:
                        self.ended[one.request_id] = one.finish_reason
                self._news.notify_all()
