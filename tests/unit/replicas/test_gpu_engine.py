"""An engine on a GPU as far as it goes without one: vLLM's real scheduler, our connector's two sides and our worker,
over a driver in Python with real memory behind its addresses."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.gpu_worker import Worker

from memory_agent.cuda_vmm import CHUNK_GRANULES
from memory_agent.errors import SettingsError
from memory_agent.lease_board import NO_FD, EngineWord
from replicas import elastic_connector, engine_config, gpu_worker
from replicas.cuda_meter import CudaMeter
from replicas.elastic_connector import ElasticKVConnector
from replicas.engine_config import build_engine_args, build_vllm_config, check_elastic
from replicas.gpu_worker import ElasticGpuWorker
from replicas.host_moves import HostCopy, HostWork
from replicas.kv_device import CudaDevice
from replicas.kv_moves import KvMoves
from tests.unit.memory_agent.mapped_cuda_driver import MappedCudaDriver
from tests.unit.replicas.modelless_engine import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    LAYERS,
    LONGEST_TOKENS,
    modelless_engine,
    modelless_spec,
)

MIB = 1 << 20
EXTENT_BLOCKS = MIB // BLOCK_BYTES
GPU = SimpleNamespace(is_cuda=lambda: True)


@pytest.fixture
def driver() -> MappedCudaDriver:
    return MappedCudaDriver(MIB // CHUNK_GRANULES[0], 64 * MIB)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, driver: MappedCudaDriver) -> None:
    """vLLM's platform is taken for CUDA by our modules, and the worker's device for the driver's."""
    for module in (elastic_connector, engine_config):
        monkeypatch.setattr(module, "current_platform", GPU)
    device = CudaDevice(0, driver, torch.device("cpu"))
    monkeypatch.setattr(elastic_connector, "worker_device", lambda: device)
    monkeypatch.setattr(elastic_connector, "get_tensor_model_parallel_rank", lambda: 0)


@contextmanager
def worker_side(folder: Path, host_buffer_blocks: int = 0) -> Iterator[tuple[ElasticKVConnector, torch.Tensor]]:
    """The worker's connector, and its KV tensor as (blocks, bytes)."""
    spec = replace(modelless_spec(folder, ceiling_blocks=256), host_buffer_bytes=host_buffer_blocks * BLOCK_BYTES)
    (folder / "model.bin").write_bytes(b"weights")
    config = build_vllm_config(spec, str(folder / "board"), 0)
    config.cache_config.kv_cache_layout = "BLHNC"
    layer = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=64, dtype=torch.float32)
    [cache] = get_kv_cache_configs(config, [{f"layers.{i}": layer for i in range(LAYERS)}], [spec.kv_ceiling_bytes])
    cache.kv_cache_layout = "BLHNC"
    connector = ElasticKVConnector(config, KVConnectorRole.WORKER, cache)
    with connector.get_mem_pool_context():
        kv = torch.zeros(connector.geometry.size_bytes, dtype=torch.int8, device=torch.device("cpu"))
    yield connector, kv.view(cache.num_blocks, BLOCK_BYTES)
    connector.shutdown()


def test_a_longest_request_always_ends_within_its_guarantee(driver: MappedCudaDriver, tmp_path: Path) -> None:
    """Where a chunk holds many blocks, the engine holds no more than its lease, and requests of the full length end one
    after the other; memory comes back when it is idle."""
    guarantee_bytes = 2 * MIB  # 16 blocks and the null block, in extents of 16
    spec = replace(modelless_spec(tmp_path, ceiling_blocks=256), kv_guarantee_bytes=guarantee_bytes)
    with modelless_engine(tmp_path, spec, drivers=[driver]) as engine:
        for number in range(4):
            engine.ask(f"r{number}", prompt=LONGEST_TOKENS - 50, tokens=50)
        while engine.scheduler.has_unfinished_requests():
            engine.step()
            engine.check()
            assert engine.held_bytes <= guarantee_bytes
        assert len(engine.finished) == 4
        engine.settle()
        assert engine.held_bytes == MIB and driver.held == 2 * MIB, "the rest, and the scratch chunk"
        assert engine.row.workers[0][1] == NO_FD and engine.word(EngineWord.MAP_FAILURES) == 0
    assert driver.held == 0


def test_a_guarantee_below_the_extents_of_a_longest_request_is_refused(
    driver: MappedCudaDriver, tmp_path: Path
) -> None:
    """Its blocks would fit, the chunks that they lie in would not: it could wait for ever."""
    spec = modelless_spec(tmp_path, ceiling_blocks=256)
    assert spec.kv_guarantee_bytes < 2 * MIB
    refused = pytest.raises(SettingsError, match=rf"takes {2 * MIB} bytes of KV memory in extents of {MIB} bytes")
    with refused, modelless_engine(tmp_path, spec, drivers=[driver]):
        pass


def test_the_worker_says_what_it_holds(on_gpu: None, tmp_path: Path) -> None:
    """At the handshake: chunks of a few of the driver's granules, no file, and the rest in whole extents."""
    with worker_side(tmp_path) as (connector, _):
        handshake = connector.get_handshake_metadata()
    assert (handshake.memory_fd, handshake.chunk_bytes, handshake.mapped_extents) == (NO_FD, MIB, [0])


def test_vllm_is_asked_for_blocks_in_one_piece(on_gpu: None) -> None:
    """On a GPU; on a CPU the connector has no wish."""
    assert ElasticKVConnector.get_required_kvcache_layout(None) == "BLHNC"


def test_a_cpu_keeps_its_layout() -> None:
    """The attention of vLLM's CPU build knows one layout only."""
    assert ElasticKVConnector.get_required_kvcache_layout(None) is None


def test_a_block_is_stored_before_vllm_can_touch_it_and_loaded_after(on_gpu: None, tmp_path: Path) -> None:
    """The worker begins a step before vLLM does: what is stored is what the block held, whatever vLLM does to it on its
    way to the connector; and what is loaded is not undone by that."""
    with worker_side(tmp_path, host_buffer_blocks=4) as (connector, blocks):
        connector.get_handshake_metadata()
        blocks[3].fill_(7)
        keys = [bytes([at]) * 32 for at in range(2)]
        moves = KvMoves(sequence=1, tokens=1, rows=1, host=HostWork(1, store=[HostCopy(0, 3, keys[0])]))
        connector.begin_step(moves)
        blocks[3].fill_(0)  # as vLLM clears a block that it hands to another request
        connector.handle_preemptions(moves)
        loads = KvMoves(sequence=2, tokens=1, rows=1, host=HostWork(2, load=[HostCopy(0, 5, keys[0])]))
        connector.begin_step(loads)
        blocks[5].fill_(0)
        connector.handle_preemptions(loads)
        assert (blocks[5] == 7).all() and not connector.get_block_ids_with_load_errors()


def test_a_step_is_begun_once(on_gpu: None, tmp_path: Path) -> None:
    """Whether the worker begins it or, where it has not, the connector: each move is made and answered one time."""
    with worker_side(tmp_path) as (connector, _):
        for sequence, begun in ((1, True), (2, False)):
            moves = KvMoves(sequence=sequence, map=[sequence], check=sequence + 1)
            if begun:
                connector.begin_step(moves)
            connector.handle_preemptions(moves)
            answer = connector.build_connector_worker_meta()
            assert answer is not None
            (ack,) = answer.acks
            assert (ack.sequence, ack.error, ack.imbalance) == (sequence, None, None)


class Recorder:
    """Stands for the connector and for the pool of a step, and notes what happens in which order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.activations = CudaMeter.__new__(CudaMeter)
        self.activations.step = self._step  # type: ignore[method-assign]

    @contextmanager
    def _step(self) -> Iterator[None]:
        self.events.append("pool opens")
        yield
        self.events.append("pool closes")

    def begin_step(self, moves: KvMoves) -> None:
        self.events.append(f"begin {moves.sequence}")

    def end_warm_up(self) -> None:
        self.events.append("warm-up ends")


def test_the_worker_begins_a_step_and_runs_it_in_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's warm-up is outside of it; after that each forward and each sampling is inside, when memory has moved."""
    recorder = Recorder()
    events = recorder.events
    monkeypatch.setattr(gpu_worker, "_connector", lambda: recorder)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("empty cache"))

    def warm_up(self: Any) -> str:
        self.execute_model(SimpleNamespace(kv_connector_metadata=None))
        return "times"

    monkeypatch.setattr(Worker, "compile_or_warm_up_model", warm_up)
    monkeypatch.setattr(Worker, "execute_model", lambda self, output: events.append("forward"))
    monkeypatch.setattr(Worker, "sample_tokens", lambda self, grammar: events.append("sample"))
    worker = ElasticGpuWorker.__new__(ElasticGpuWorker)
    assert worker.compile_or_warm_up_model() == "times"
    assert events == ["forward", "warm-up ends", "empty cache"]
    events.clear()
    worker.execute_model(SimpleNamespace(kv_connector_metadata=KvMoves(sequence=4)))  # type: ignore[arg-type]
    worker.sample_tokens(None)
    pooled = ["pool opens", "forward", "pool closes", "pool opens", "sample", "pool closes"]
    assert events == ["begin 4", *pooled]


def test_the_worker_takes_no_other_connector(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names both classes."""
    monkeypatch.setattr(gpu_worker, "get_kv_transfer_group", nullcontext)
    with pytest.raises(TypeError, match="ElasticGpuWorker needs ElasticKVConnector, found nullcontext"):
        gpu_worker._connector()


def test_an_engine_on_a_gpu_gets_our_worker_and_may_share_the_device(on_gpu: None, tmp_path: Path) -> None:
    """An elastic one; a static one gets vLLM's own, and neither waits for nine tenths of the GPU to be free."""
    spec = modelless_spec(tmp_path)
    elastic = build_vllm_config(spec, str(tmp_path / "board"), 0)
    assert elastic.parallel_config.worker_cls == "replicas.gpu_worker.ElasticGpuWorker"
    static = build_engine_args(replace(spec, elastic=False))
    assert static.worker_cls == "auto"
    assert static.gpu_memory_utilization == elastic.cache_config.gpu_memory_utilization == 0.05


def test_an_engine_on_a_cpu_gets_nothing_of_it(tmp_path: Path) -> None:
    """Its worker is that for a CPU, and the share of memory is vLLM's."""
    config = build_vllm_config(modelless_spec(tmp_path), str(tmp_path / "board"), 0)
    assert config.parallel_config.worker_cls == "replicas.cpu_worker.ElasticCpuWorker"
    assert config.cache_config.gpu_memory_utilization > 0.5


def test_sleep_mode_is_refused() -> None:
    """vLLM's cumem allocator would move memory behind the lease's back."""
    model = SimpleNamespace(is_hybrid=False, is_attention_free=False, enable_cumem_allocator=True)
    with pytest.raises(SettingsError, match="sleep mode"):
        check_elastic(SimpleNamespace(model_config=model))  # type: ignore[arg-type]
