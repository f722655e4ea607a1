"""From an EngineSpec to vLLM's configuration, static or elastic."""

from typing import Any

from vllm.config import KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext

from memory_agent.errors import SettingsError
from memory_agent.kv_fingerprint import model_identity
from replicas.elastic_settings import ElasticSettings
from replicas.paced_core import PacedCore
from replicas.spec import EngineSpec

_ELASTIC_ON_GPU = {"worker_cls": "replicas.gpu_worker.ElasticGpuWorker"}
_ELASTIC_ON_CPU = {"worker_cls": "replicas.cpu_worker.ElasticCpuWorker"}
_GPU_MAP_BATCH_BYTES = 1 << 30
"""A step that moves memory waits for the GPU: few large moves cost less than many small ones."""
_SHARED_GPU = {"gpu_memory_utilization": 0.05}
"""vLLM wants this share of a GPU to be free when an engine starts; what it uses is decided by kv_cache_memory_bytes."""


def build_engine_args(spec: EngineSpec, **overrides: Any) -> AsyncEngineArgs:
    """vLLM's arguments for ``spec``, without anything elastic: what the ingress needs, and a static engine."""
    settings: dict[str, Any] = {
        "model": spec.model_path,
        "served_model_name": [spec.model_name],
        "dtype": spec.dtype,
        "max_model_len": spec.max_model_len,
        "max_num_seqs": spec.max_num_seqs,
        "max_num_batched_tokens": spec.max_num_batched_tokens,
        "tensor_parallel_size": spec.tensor_parallel_size,
        "kv_cache_memory_bytes": spec.kv_ceiling_bytes // spec.tensor_parallel_size,
        "enable_prefix_caching": True,
        **(_SHARED_GPU if current_platform.is_cuda() else {}),
    }
    return AsyncEngineArgs(**(settings | spec.engine_args | overrides))


def build_vllm_config(spec: EngineSpec, board_path: str = "", row: int = 0) -> VllmConfig:
    """The resolved configuration of an engine; elastic where ``spec`` says so and a lease board is given.

    Raises what vLLM raises for settings it refuses, SettingsError for a model that cannot be elastic.
    """
    if not (spec.elastic and board_path):
        return _resolve(build_engine_args(spec), spec)
    settings = ElasticSettings(
        board_path=board_path,
        row=row,
        rest_bytes=spec.kv_rest_bytes // spec.tensor_parallel_size,
        kv_guarantee_bytes=spec.kv_guarantee_bytes,
        charge_activations=spec.charge_activations,
        token_bytes=spec.token_bytes,
        row_bytes=spec.row_bytes,
        host_buffer_bytes=spec.host_buffer_bytes // spec.tensor_parallel_size,
        weights_identity=model_identity(spec.model_path),
        ttft_slo_s=spec.ttft_slo_ms / 1000,
        tpot_slo_s=spec.tpot_slo_ms / 1000,
        **({"map_batch_bytes": _GPU_MAP_BATCH_BYTES} if current_platform.is_cuda() else {}),
    )
    transfer = KVTransferConfig(
        kv_connector="ElasticKVConnector",
        kv_connector_module_path="replicas.elastic_connector",
        kv_role="kv_both",
        kv_connector_extra_config=settings.to_extra_config(),
        kv_load_failure_policy="recompute",
    )
    worker = _ELASTIC_ON_GPU if current_platform.is_cuda() else _ELASTIC_ON_CPU
    config = _resolve(build_engine_args(spec, kv_transfer_config=transfer, **worker), spec)
    check_elastic(config)
    # Chosen after vLLM has settled on synchronous or asynchronous scheduling.
    name = "ElasticAsyncScheduler" if config.scheduler_config.async_scheduling else "ElasticScheduler"
    config.scheduler_config.scheduler_cls = f"replicas.elastic_scheduler.{name}"
    return config


def build_paced_core(spec: EngineSpec, config: VllmConfig) -> PacedCore | None:
    """What takes the engine's place where ``spec`` asks for it, else None. Its KV blocks are as many as an engine's."""
    if spec.paced_tokens_per_s is None:
        return None
    size = config.model_config.get_vocab_size()
    block_tokens = config.cache_config.block_size or 1
    config.cache_config.num_gpu_blocks = config.scheduler_config.max_num_seqs * (spec.max_model_len // block_tokens + 1)
    # The first ids are control tokens, which are no text, and single bytes, which are rarely valid UTF-8 in a row.
    ids = range(size // 8, size)
    return PacedCore(ids, spec.paced_tokens_per_s, spec.max_num_seqs, config.model_config.max_model_len)


def check_elastic(config: VllmConfig) -> None:
    """Raises SettingsError for a kind of model whose tokens are not known to stay the same with elastic memory, and for
    settings that contradict it."""
    model = config.model_config
    if model.is_hybrid or model.is_attention_free:
        raise SettingsError(
            f"{model.architecture} has layers that keep a recurrent state in the KV cache, and these are not proven "
            "exact with elastic memory; set elastic: false"
        )
    if model.enable_cumem_allocator:
        raise SettingsError(
            "sleep mode and vLLM's cumem allocator move the memory of an engine themselves: leave them out, or set "
            "elastic: false"
        )


def _resolve(args: AsyncEngineArgs, spec: EngineSpec) -> VllmConfig:
    config = args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    if spec.async_scheduling is not None:
        # vLLM's CPU platform turns it off whatever the argument says.
        config.scheduler_config.async_scheduling = spec.async_scheduling
    return config
