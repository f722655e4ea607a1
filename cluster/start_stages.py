"""The stages of a start that `ellm serve` and a Serve application of one's own have in common.

    models -> memory -> engines -> control

Whoever runs them (``cluster.launcher``, ``cluster.serve_app``) has connected to Ray before the last, and deploys the
API after it.
"""

from collections.abc import Callable
from typing import Any

from cluster.config import ClusterConfig
from cluster.device import Device
from cluster.host_memory import free_memory_bytes
from cluster.models import ModelFacts, read_facts, resolve_source
from cluster.preflight import check_host_memory, check_shared_memory
from cluster.sizing import GIB, MIB, Sizing, plan_sizes

RAY_CPUS = 2
"""Only Ray's bookkeeping, a hundredth an actor. Not the machine's: Ray starts as many idle workers."""
OBJECT_STORE_BYTES = 128 * MIB
CONTROL_TIMEOUT_S = 60.0
PROCESS_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    # A replica that ends waits for its requests; one that hangs would wait for ever.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_COLOR": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Of every process of a cluster, Ray's own included."""

Say = Callable[[str], None]


def read_models(config: ClusterConfig, say: Say) -> list[ModelFacts]:
    """Facts of every model, downloaded or converted where it is not there. Raises SettingsError and
    DefaultModelError."""
    facts = []
    for model in config.models:
        facts.append(read_facts(resolve_source(model.source, say), model))
        say(f"{model.name}: {facts[-1].weights_line}")
    return facts


def size_cluster(config: ClusterConfig, device: Device, facts: list[ModelFacts], say: Say) -> Sizing:
    """Sizes that fit the memory that is free on this host and its device now. Raises SettingsError."""
    sizing = plan_sizes(config, facts, device.free_bytes(), device)
    for model, spec in zip(config.models, sizing.specs, strict=True):
        say(
            f"{model.replicas_shown} x {spec.model_name}, {spec.max_model_len} tokens: KV in MiB "
            f"{spec.kv_rest_bytes // MIB} at rest, {spec.kv_guarantee_bytes // MIB} guaranteed, "
            f"{spec.kv_ceiling_bytes // MIB} at most"
        )
    engines = list(zip(config.models, sizing.specs, strict=True))
    buffers = sum(model.most_replicas * spec.host_buffer_bytes for model, spec in engines)
    check_shared_memory(buffers)
    if device.is_gpu:
        check_host_memory(sum(model.most_replicas for model, _ in engines), buffers, free_memory_bytes())
    say(f"KV budget {sizing.budget_bytes / GIB:.2f} GiB; the cluster needs {sizing.needed_bytes / GIB:.2f} GiB")
    return sizing


def check_engines(sizing: Sizing, say: Say) -> None:
    """Ask vLLM about every model's settings. Raises SettingsError."""
    from cluster.engine_check import check_engine

    for spec in sizing.specs:
        check_engine(spec)
    say("vLLM accepts the settings")


def start_control(config: ClusterConfig, cluster_id: str, device: Device, sizing: Sizing, say: Say) -> Any:
    """The controller and, where an engine is elastic, this node's memory agent. Waits until both answer. Returns the
    model registry, which goes on starting meanwhile."""
    import ray

    from cluster.controller import ensure_controller
    from cluster.model_registry import RegistrySpec, ensure_registry
    from cluster.model_set import ModelSet, new_entry
    from cluster.target_planner import TargetSettings
    from memory_agent.agent import AgentSpec, ensure_agent

    models = zip(config.models, sizing.specs, sizing.guarantees_bytes, strict=True)
    initial = ModelSet(tuple(new_entry(*parts) for parts in models), sizing.budget_bytes)
    registry = ensure_registry(RegistrySpec(cluster_id, device.name, config), initial)
    waiting = [ensure_controller(TargetSettings.of(config)).snapshot.remote()]
    if sizing.budget_bytes:
        sizes = sizing.budget_bytes, sizing.weights_bytes
        agent_spec = AgentSpec(cluster_id, device.name, *sizes, fetch_bytes_s=config.memory.fetch_rate)
        waiting.append(ensure_agent(agent_spec).describe.remote())
    ray.get(waiting, timeout=CONTROL_TIMEOUT_S)
    say("memory agent and controller are up")
    return registry
