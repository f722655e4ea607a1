"""An elastic engine without a model, in this process: vLLM's real scheduler and block pool, our connector's two sides,
workers with real memory. Memory, leases, waiting and preemption are those of a real engine, and its tokens depend on
what every position of every block held (``ModellessWorker``)."""

import json
import os
import random
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs, get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from memory_agent.host_segment import HostSegment, host_segment_path
from memory_agent.lease_board import LIMIT_UNIT_BYTES, AgentWord, EngineWord, Lease, LeaseBoard
from replicas import kv_memory
from replicas.elastic_scheduler import ElasticAsyncScheduler, ElasticScheduler
from replicas.engine_config import build_vllm_config
from replicas.host_copies import HostCopies
from replicas.host_kv import HostKv
from replicas.kv_device import CudaDevice
from replicas.kv_geometry import kv_geometry
from replicas.kv_memory import KvMemory
from replicas.kv_moves import KvAcks, KvHandshake
from replicas.migration import Migration
from replicas.migration_copies import MigrationCopies
from replicas.spec import EngineSpec
from tests.unit.memory_agent.failing_host_vmm import FailingHostVmm
from tests.unit.memory_agent.mapped_cuda_driver import MappedCudaDriver
from tests.unit.replicas.modelless_worker import VOCABULARY, ModellessWorker, Resumption, WorkerOutput, expected_tokens

BLOCK_TOKENS, LAYERS = 32, 4
BLOCK_BYTES = LIMIT_UNIT_BYTES  # layers x (K, V) x 64 floats x tokens
LONGEST_TOKENS = 512
LONGEST_BLOCKS = LONGEST_TOKENS // BLOCK_TOKENS
GUARANTEE_BLOCKS = LONGEST_BLOCKS + 2
REST_BLOCKS = 2
STEP_S = 0.01


class Clock:
    """Seconds of a simulated monotonic clock; every engine of a test shares one."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def modelless_spec(folder: Path, ranks: int = 1, ceiling_blocks: int = 64, host_blocks: int = 0) -> EngineSpec:
    """Settings of an engine whose model is a configuration in ``folder`` and nothing else; ``host_blocks`` of host
    buffer on each rank."""
    model = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "vocab_size": 128}
    sizes = {"num_hidden_layers": LAYERS, "num_attention_heads": 1, "max_position_embeddings": LONGEST_TOKENS}
    (folder / "config.json").write_text(json.dumps(model | sizes))
    (folder / "model.bin").touch()  # what the host buffer's fingerprint is taken of
    return EngineSpec(
        model_name="none",
        model_path=str(folder),
        max_model_len=LONGEST_TOKENS,
        kv_ceiling_bytes=ceiling_blocks * BLOCK_BYTES,
        kv_rest_bytes=REST_BLOCKS * BLOCK_BYTES,
        kv_guarantee_bytes=ranks * GUARANTEE_BLOCKS * BLOCK_BYTES,
        weights_bytes=1,
        host_buffer_bytes=host_blocks * BLOCK_BYTES,
        dtype="float32",
        max_num_seqs=8,
        max_num_batched_tokens=256,
        engine_args={"block_size": BLOCK_TOKENS, "skip_tokenizer_init": True, "enforce_eager": True},
    )


class ModellessEngine:
    """See the module. ``vmm`` of each rank fails on purpose where its plan says so.

    Args:
        board, row: where its lease is; the row must have one.
        clock: moves on by STEP_S with each step.
        drivers: of the GPU of each rank; none for an engine on the host.
        spec: as for one rank; each of ``ranks`` has as much.
    """

    def __init__(
        self,
        board: Path,
        row: int,
        clock: Clock,
        spec: EngineSpec,
        ranks: int = 1,
        drivers: Sequence[MappedCudaDriver] = (),
    ) -> None:
        self.clock = clock
        layout = "BLHNC" if drivers else "LBHNC"
        self.row = LeaseBoard.open(board).row(row)
        self.finished: set[str] = set()
        self.ended: dict[str, EngineCoreOutput] = {}
        """The last output of each that has finished."""
        self.tokens: defaultdict[str, list[int]] = defaultdict(list)
        """What clients got, by request."""
        self.prompts: dict[str, list[int]] = {}
        self.first_steps: dict[str, int] = {}
        """Tokens that each request has computed in its first step."""
        self.gone: set[str] = set()
        """Clients that go away while the workers run the next step."""
        self._in_flight: deque[tuple[SchedulerOutput, list[WorkerOutput]]] = deque()
        config = build_vllm_config(spec, str(board), row)
        config.cache_config.kv_cache_layout = layout
        layer = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=64, dtype=torch.float32)
        [cache] = get_kv_cache_configs(config, [{f"layers.{i}": layer for i in range(LAYERS)}], [spec.kv_ceiling_bytes])
        cache.kv_cache_layout = layout
        config.cache_config.num_gpu_blocks = cache.num_blocks
        self._depth = config.max_concurrent_batches
        self.scheduler = (ElasticAsyncScheduler if spec.async_scheduling else ElasticScheduler)(
            vllm_config=config,
            kv_cache_config=cache,
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_TOKENS,
        )
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK_TOKENS, sha256)
        self.vmms: list[FailingHostVmm] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kv_memory, "HostVmm", self._make_vmm)
            devices = [CudaDevice(0, driver, torch.device("cpu")) for driver in drivers] or [None] * ranks
            self.ranks = [KvMemory(kv_geometry(cache), REST_BLOCKS * BLOCK_BYTES, device) for device in devices]
        segments = self._make_segments(board, row, spec.host_buffer_bytes // BLOCK_BYTES)
        connector = self.scheduler._elastic_connector
        self.workers = [
            ModellessWorker(
                at,
                memory,
                BLOCK_TOKENS,
                MigrationCopies(connector._transport(at), memory.blocks),
                HostCopies(segment, memory.blocks) if segment else None,
            )
            for at, (memory, segment) in enumerate(zip(self.ranks, segments, strict=True))
        ]
        connector.set_xfer_handshake_metadata_pp_aware({(0, at): _handshake(one) for at, one in enumerate(self.ranks)})
        self.kv = self.scheduler._kv
        self.kv._clock = clock

    def _make_vmm(self, name: str, max_bytes: int) -> FailingHostVmm:
        self.vmms.append(FailingHostVmm(name, max_bytes))
        return self.vmms[-1]

    def _make_segments(self, board: Path, row: int, slots: int) -> list[HostSegment | None]:
        """The host buffer of each rank."""
        if not slots:
            return [None] * len(self.ranks)
        paths = [host_segment_path(board, row, rank) for rank in range(len(self.ranks))]
        return [HostSegment.create(path, BLOCK_BYTES, slots, b"f" * 32) for path in paths]

    def set_limit(self, blocks: int) -> None:
        """Play the agent: a new lease of so many blocks on every rank, with the next revision."""
        limit_bytes = blocks * BLOCK_BYTES * len(self.ranks)
        self.row.set(AgentWord.TARGET_BYTES, limit_bytes)
        self.row.set(AgentWord.LEASE, Lease(limit_bytes, self.row.lease.revision + 1).pack())

    def ask(
        self, request_id: str, prompt: int, tokens: int, shared: int = 0, objectives: dict[str, Any] | None = None
    ) -> None:
        """A request of ``prompt`` tokens for ``tokens`` tokens; all but its first ``shared`` are its own."""
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, extra_args=objectives)
        ids = _random_tokens("shared", shared) + _random_tokens(request_id, prompt - shared)
        self.prompts[request_id] = ids
        self.scheduler.add_request(Request(request_id, ids, params, None, block_hasher=self._hasher))

    def step(self) -> None:
        """One turn of engine core, as vLLM makes it: with asynchronous scheduling a step is scheduled before the output
        of the one before it is looked at."""
        self.clock.now_s += STEP_S
        if self.scheduler.has_requests():
            planned = self.scheduler.schedule()
            new = [one.req_id for one in planned.scheduled_new_reqs]
            self.first_steps |= {one: planned.num_scheduled_tokens[one] for one in new}
            self._in_flight.append((planned, [worker.execute(planned) for worker in self.workers]))
            more = planned.total_num_scheduled_tokens or self.scheduler.has_requests()
            if len(self._in_flight) < self._depth and more:
                return
        if self._in_flight:
            planned, outputs = self._in_flight.popleft()
            self.scheduler.finish_requests(self.gone, RequestStatus.FINISHED_ABORTED)
            self.gone.clear()
            answers = self.scheduler.update_from_output(planned, _runner_output(outputs))
            for answer in answers.values():
                for one in answer.outputs:
                    self.tokens[one.request_id] += one.new_token_ids
                self.ended |= {one.request_id: one for one in answer.outputs if one.finished}
                self.finished |= {one.request_id for one in answer.outputs if one.finished}

    @property
    def host(self) -> HostKv:
        """Of an engine with a host buffer."""
        host = self.scheduler._elastic_connector.host
        assert host is not None
        return host

    @property
    def migration(self) -> Migration:
        migration = self.scheduler._elastic_connector.migration
        assert migration is not None
        return migration

    @property
    def resumptions(self) -> list[Resumption]:
        return self.workers[0].resumptions

    def check_tokens(self) -> None:
        """Every request that has finished got the tokens of an engine that never loses or mixes up anything."""
        for request_id in self.finished:
            tokens = self.tokens[request_id]
            assert tokens == expected_tokens(tuple(self.prompts[request_id]), len(tokens)), request_id

    def run(self, steps: int = 5000) -> None:
        """Steps until every request has finished; an AssertionError where ``steps`` do not suffice."""
        for _ in range(steps):
            if not self.scheduler.has_unfinished_requests():
                return
            self.step()
        raise AssertionError(f"{self.scheduler.get_request_counts()} requests run and wait after {steps} steps")

    def settle(self, seconds: float = 10.0) -> None:
        """Idle for ``seconds``, stepping when the engine has work, as its replica would see to."""
        for _ in range(round(seconds / STEP_S)):
            self.step()

    @property
    def held_bytes(self) -> int:
        """By the operating system, over all ranks."""
        return sum(memory.device.vmm.held_bytes() for memory in self.ranks)

    @property
    def held_blocks(self) -> int:
        return self.held_bytes // (BLOCK_BYTES * len(self.ranks))

    def word(self, word: EngineWord) -> int:
        return self.row.get(word)

    def close(self) -> None:
        self.scheduler.shutdown()
        for worker in self.workers:
            worker.migration.close()
            if worker.copies is not None:
                worker.copies.close()
        for memory in self.ranks:
            memory.device.vmm.close()

    def check(self) -> None:
        """Every book balances: vLLM's blocks, each rank's balloon, and the board with the operating system."""
        self.kv.parking.check_conservation()
        for memory in self.ranks:
            memory.check_conservation()
        assert self.held_bytes <= self.word(EngineWord.COMMITTED_BYTES)


def _random_tokens(name: str, count: int) -> list[int]:
    return random.Random(name).choices(range(VOCABULARY), k=count)


def _runner_output(outputs: list[WorkerOutput]) -> ModelRunnerOutput:
    """What vLLM makes of the outputs of all ranks: the tokens of the first, and what any connector has to say."""
    connector = outputs[0].connector
    acks = connector.kv_connector_worker_meta
    for other in outputs[1:]:
        assert isinstance(acks, KvAcks) and other.connector.kv_connector_worker_meta is not None
        acks = acks.aggregate(other.connector.kv_connector_worker_meta)
    ids = list(outputs[0].sampled)
    return ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index={request_id: at for at, request_id in enumerate(ids)},
        sampled_token_ids=list(outputs[0].sampled.values()),
        kv_connector_output=replace(
            connector,
            kv_connector_worker_meta=acks,
            invalid_block_ids=set().union(*(output.connector.invalid_block_ids for output in outputs)),
        ),
    )


def _handshake(memory: KvMemory) -> KvHandshake:
    return KvHandshake(
        pid=os.getpid(), memory_fd=memory.fd, chunk_bytes=memory.chunk_bytes, mapped_extents=sorted(memory.mapped)
    )


@contextmanager
def modelless_engine(
    folder: Path, spec: EngineSpec | None = None, ranks: int = 1, drivers: Sequence[MappedCudaDriver] = ()
) -> Iterator[ModellessEngine]:
    """One engine with a board of its own; the test plays the agent. Its lease is the guarantee at first."""
    board, spec = folder / "board", spec or modelless_spec(folder, ranks)
    row = LeaseBoard.create(board, ranks * spec.kv_ceiling_bytes).row(0)
    row.set(AgentWord.LEASE, Lease(spec.kv_guarantee_bytes, 1).pack())
    engine = ModellessEngine(board, 0, Clock(), spec, ranks, drivers)
    try:
        yield engine
    finally:
        engine.close()
