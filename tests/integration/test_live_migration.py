"""Streams move between real engines in the middle of their answers: their tokens are those of an undisturbed run.
float32, greedy. The relays are the cluster's, between them and the engines are real output channels, and no Ray."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from cluster.core_client import ClusterCore
from cluster.migration import MigrationError
from cluster.move import Migrated
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
from tests.integration.shaken_engine import prompts
from tests.integration.tiny_models import BLOCK_TOKENS, IDS, MAX_MODEL_LEN, tiny_llama, tiny_spec

TOKENS = 300
PROMPTS = prompts(7, IDS)[1:]
DEADLINE_S = 300.0

pytestmark = pytest.mark.slow


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
    """A Ray Serve handle over replicas in this process: the route's wish, else the first one."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self.replicas = {replica.name: replica for replica in replicas}

    def options(self, *, method_name: str) -> "Handle":
        assert method_name == "generate"
        return self

    def remote(self, frames: Frames, address: InboxAddress, ticket: int, route: Route) -> "asyncio.Task[None]":
        replica = self.replicas[route.to or next(iter(self.replicas))]
        route.replica = Standing(replica.name)
        return asyncio.get_running_loop().create_task(replica.generate(frames, address, ticket))

    def broadcast(self, method: str, ingress: str, queued: int) -> "Handle":
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        return [
            ReplicaStats(one.name, 1, one.engine.streams, one.engine.take_stats()) for one in self.replicas.values()
        ]


@asynccontextmanager
async def two_replicas(spec: EngineSpec, folder: Path) -> AsyncIterator[ClusterCore]:
    """Replicas "a" and "b" of one model on one board, and the core that relays to them. New requests go to "a"."""
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
        core = ClusterCore("tiny", handle, _info(), replicas=2, replica_limit=16)  # type: ignore[arg-type]
        stack.callback(core.shutdown)
        await core.open("127.0.0.1")
        async with asyncio.timeout(30):
            while len(core.replica_numbers) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        yield core


def _info() -> ReplicaInfo:
    return ReplicaInfo(("generate",), MAX_MODEL_LEN, 160, BLOCK_TOKENS)


class Streams:
    """Requests through a core, and what has come of each."""

    def __init__(self, core: ClusterCore) -> None:
        self.core = core
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, Any] = {}
        self._news = asyncio.Condition()
        self._reader = asyncio.get_running_loop().create_task(self._read())

    async def ask(self, request_id: str, prompt: Sequence[int], salt: str | None = None) -> None:
        self.tokens[request_id] = []
        params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
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
                    assert one.request_id not in self.ended
                    self.tokens[one.request_id] += one.new_token_ids
                    if one.finished:
                        self.ended[one.request_id] = one.finish_reason
                self._news.notify_all()


async def run_all(core: ClusterCore) -> Streams:
    streams = Streams(core)
    for number, prompt in enumerate(PROMPTS):
        await streams.ask(f"r{number}", prompt)
    return streams


def test_streams_that_move_have_the_tokens_of_an_undisturbed_run(tmp_path: Path) -> None:
    """Each of six streams moves from one replica to the other and back while all of them decode."""
    spec = tiny_spec(tiny_llama(tmp_path / "llama"), elastic=True)

    async def run() -> None:
        async with two_replicas(spec, tmp_path) as core:
            undisturbed = await run_all(core)
            await undisturbed.all_ended()
            assert core.mover.moved == 0
            streams, rng = Streams(core), random.Random(1)
            for number, prompt in enumerate(PROMPTS):
                await streams.ask(f"m{number}", prompt, salt=f"tenant {number}")
            moved: list[Migrated] = []
            for to in "ba":
                for number in range(len(PROMPTS)):
                    name = f"m{number}"
                    await streams.until(name, rng.randrange(10, 60) + (len(streams.tokens[name]) if to == "a" else 0))
                    if name not in streams.ended:
                        moved.append(await core.migrate(name, to))
            await streams.all_ended()
            assert [one.destination for one in moved[: len(PROMPTS)]] == ["b"] * len(PROMPTS)
            assert len(moved) > len(PROMPTS)
            assert all(one.blocks_ahead >= 3 for one in moved)
            assert core.mover.moved == len(moved)
            assert core.continued == core.retried == 0
            for number in range(len(PROMPTS)):
                assert streams.tokens[f"m{number}"] == undisturbed.tokens[f"r{number}"]
            with pytest.raises(MigrationError, match="has finished"):
                await core.migrate("m0", "a")

    asyncio.run(run())


def test_what_cannot_be_moved_says_why(tmp_path: Path) -> None:
    spec = tiny_spec(tiny_llama(tmp_path / "llama"), elastic=True)

    async def run() -> None:
        async with two_replicas(spec, tmp_path) as core:
            streams = Streams(core)
            await streams.ask("m", PROMPTS[0])
            await streams.ask("n", PROMPTS[1])
            await streams.until("m", 5)
            for request_id, to, why in (("x", "b", "never was"), ("m", "a", "is at a already"), ("m", "c", "a, b")):
                with pytest.raises(MigrationError, match=why):
                    await core.migrate(request_id, to)
            both = await asyncio.gather(
                core.migrate("m", "b"), core.migrate("m", "b"), core.migrate("n", "b"), return_exceptions=True
            )
            assert isinstance(both[0], Migrated)
            assert "is being moved to b already" in str(both[1])
            assert "one leaves at a time" in str(both[2])
            await streams.all_ended()
            assert {len(tokens) for tokens in streams.tokens.values()} == {TOKENS}

    asyncio.run(run())
