"""One vLLM engine driven from this process, elastic or static, without Ray: for exactness tests and benchmarks."""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from vllm.config import VllmConfig
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.utils import CoreEngineProcManager
from vllm.v1.metrics.loggers import StatLoggerFactory

from memory_agent.lease_board import LIMIT_UNIT_BYTES, NO_FD, AgentWord, EngineWord, Lease, LeaseBoard, Row, RowState
from replicas.engine_config import build_vllm_config
from replicas.environment import engine_environment, environment
from replicas.spec import EngineSpec
from replicas.vllm_plugin import own_engine_processes

if TYPE_CHECKING:  # it brings Ray, which an engine does without
    from memory_agent.agent import Registration


@dataclass(frozen=True)
class Instruments:
    """What a benchmark fits to an engine, through vLLM's own options.

    Attributes:
        stat_loggers: told of every step, as AsyncLLM's.
        prepare: may change vLLM's resolved configuration before the start.
    """

    stat_loggers: Sequence[StatLoggerFactory] = ()
    prepare: Callable[[VllmConfig], None] | None = None


_BARE = Instruments()


@dataclass
class LocalEngine:
    """A running engine. ``row`` is its row of the lease board; None for a static one."""

    llm: AsyncLLM
    row: Row | None
    core_pid: int

    def core_process(self) -> psutil.Process:
        """vLLM's EngineCore process; its children are the workers."""
        return psutil.Process(self.core_pid)

    def set_limit(self, limit_bytes: int) -> None:
        """Play the agent: a new lease with the next revision."""
        assert self.row is not None
        lease = Lease(limit_bytes // LIMIT_UNIT_BYTES * LIMIT_UNIT_BYTES, self.row.lease.revision + 1)
        self.row.set(AgentWord.TARGET_BYTES, lease.limit_bytes)
        self.row.set(AgentWord.LEASE, lease.pack())

    def word(self, word: EngineWord) -> int:
        assert self.row is not None
        return self.row.get(word)

    def moves_ns(self) -> int:
        """What mapping and unmapping KV memory took since the start, on the slowest rank."""
        return self.word(EngineWord.INFLATE_NS) + self.word(EngineWord.DEFLATE_NS)

    def rank_bytes_os(self) -> list[int]:
        """KV bytes that each rank holds, from the operating system; nothing for those on a GPU."""
        assert self.row is not None
        return [os.stat(f"/proc/{pid}/fd/{fd}").st_blocks * 512 for pid, fd in self.row.workers if fd != NO_FD]

    def held_bytes_os(self) -> int:
        """KV bytes held, from the operating system."""
        return sum(self.rank_bytes_os())

    async def wake(self) -> None:
        """What the replica does when the board has news for an idle engine."""
        await self.llm.engine_core.call_utility_async("is_scheduler_paused")

    async def generate(
        self, prompt: Sequence[int], tokens: int, request_id: str, adapter: LoRARequest | None = None
    ) -> list[int]:
        """Greedy token ids, exactly ``tokens`` of them."""
        params = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
        )
        out: list[int] = []
        async for output in self.llm.generate(
            {"prompt_token_ids": list(prompt)}, params, request_id, lora_request=adapter
        ):
            out = list(output.outputs[0].token_ids)
        return out

    async def generate_all(
        self, prompts: Sequence[Sequence[int]], tokens: int, name: str, adapters: Sequence[LoRARequest | None] = (None,)
    ) -> list[list[int]]:
        """All prompts at once; they take turns with ``adapters``."""
        turns = zip(prompts, itertools.cycle(adapters), strict=False)
        return await asyncio.gather(
            *(self.generate(prompt, tokens, f"{name}-{i}", adapter) for i, (prompt, adapter) in enumerate(turns))
        )


@asynccontextmanager
async def local_engine(
    spec: EngineSpec, board: Path | None, engines: int = 1, instruments: Instruments = _BARE
) -> AsyncIterator[LocalEngine]:
    """Start an engine, one of ``engines`` that share the cores; an elastic one if ``spec`` says so, on a new lease
    board at ``board`` that the caller writes in the agent's place. The lease is the whole ceiling at first."""
    if board is None or not spec.elastic:
        async with _running(spec, "", None, engines, instruments) as engine:
            yield engine
        return
    row = LeaseBoard.create(board, spec.ceiling_bytes).row(0)
    row.name("engine", spec.model_name)
    row.set(AgentWord.LEASE, Lease(spec.ceiling_bytes, 1).pack())
    row.set(AgentWord.STATE, RowState.STARTING)
    try:
        async with _running(spec, str(board), row, engines, instruments) as engine:
            yield engine
    finally:
        os.unlink(board)


@asynccontextmanager
async def local_engine_at(
    spec: EngineSpec, place: "Registration", engines: int = 1, instruments: Instruments = _BARE
) -> AsyncIterator[LocalEngine]:
    """Start an elastic engine at a row that a memory agent has given."""
    row = LeaseBoard.open(Path(place.board_path)).row(place.row)
    async with _running(spec, place.board_path, row, engines, instruments) as engine:
        yield engine


@asynccontextmanager
async def _running(
    spec: EngineSpec, board: str, row: Row | None, engines: int, instruments: Instruments
) -> AsyncIterator[LocalEngine]:
    own_engine_processes()
    config = build_vllm_config(spec, board, row.index if row else 0)
    if instruments.prepare is not None:
        instruments.prepare(config)
    with environment(engine_environment(spec, engines)):
        llm = AsyncLLM.from_vllm_config(config, stat_loggers=list(instruments.stat_loggers), disable_log_stats=True)
    try:
        yield LocalEngine(llm, row, _core_pid(llm))
    finally:
        llm.shutdown()


def _core_pid(llm: AsyncLLM) -> int:
    """Of vLLM's EngineCore process. On a GPU it is the worker too, and has no children to be known by."""
    manager = llm.engine_core.resources.engine_manager
    assert isinstance(manager, CoreEngineProcManager)
    (process,) = manager.processes
    assert process.pid is not None
    return process.pid
