"""A cluster's configuration from that of `ray.serve.llm`: what is kept, and each change with its reason.

Every key is taken over, named as a change, or refused; none is dropped in silence. Defaults that differ are named too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from cluster.config import HttpConfig
from cluster.config_file import ConfigError, validated
from cluster.ray_llm_file import Tree, check_llm_config, read_file, runtime_env_changes

_MOST_REPLICAS = 32
_RAY_AUTO = {"min_replicas": 1, "max_replicas": 100}
_DTYPES = {"half": "float16", "float": "float32"}
_SAME_KEYS = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "async_scheduling", "reasoning_parser")
_DROPPED_ARGS = {
    "gpu_memory_utilization": "engines share memory.budget, by default all that is free",
    "distributed_executor_backend": "each replica starts its own worker",
    "enable_auto_tool_choice": "it is on where there is a tool_call_parser",
    "kv_transfer_config": "the KV cache is elastic; for a buffer in host memory set memory.host_buffer",
    "num_gpu_blocks_override": "kv_ceiling says what a replica's KV memory grows to",
    "disable_log_stats": "statistics are always kept",
    "scheduler_cls": "the elastic scheduler is used",
    "worker_cls": "the elastic worker is used",
}
_PARALLEL_ARGS = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
_SERVER_ARGS = {
    "chat_template": "the checkpoint's own is used: put the template there, as chat_template.jinja",
    "default_chat_template_kwargs": "send chat_template_kwargs with a request",
}
_REFUSED_ARGS = {
    "api_key": "keys are in a file of their own: `ellm keys create` makes one, auth.keys_file names it",
    "lora_modules": "LoRA adapters are not loaded on replicas yet; without this key the model itself is served",
}
_UNSET_ARGS = {
    "max_model_len": "at most 8192 here, where vLLM takes the model's own limit",
    "max_num_seqs": "64 here, where vLLM takes 256 or more",
}
"""Defaults that differ."""
_DROPPED_KEYS = {
    "accelerator_type": "engines run on what this machine has",
    "accelerator_config": "engines run on what this machine has",
    "placement_group_config": "engines are placed beside their memory agent",
    "log_engine_metrics": "metrics are always on, at /metrics",
}
_DROPPED_DEPLOYMENT = {
    "name": "deployments have names of their own",
    "ray_actor_options": "engines are placed beside their memory agent",
    "placement_group_bundles": "engines are placed beside their memory agent",
    "placement_group_strategy": "engines are placed beside their memory agent",
    "max_ongoing_requests": "max_num_seqs says what runs, and admission who waits",
    "max_queued_requests": "admission.max_requests says how many wait",
    "health_check_period_s": "it is set by the cluster",
    "health_check_timeout_s": "it is set by the cluster",
    "graceful_shutdown_wait_loop_s": "it is set by the cluster",
    "graceful_shutdown_timeout_s": "it is set by the cluster: a replica goes on with its requests for ten minutes",
    "logging_config": "it is set by the cluster",
    "request_router_config": "requests are routed by predicted latency; see routing.policy",
    "user_config": "there is none here",
}
_REFUSED_KEYS = {
    "lora_config": "LoRA adapters are not loaded on replicas yet; without this key the model itself is served",
    "server_cls": "another server than ray.serve.llm's own cannot be taken over; remove the key to serve with vLLM",
    "callback_config": "callbacks are not run; remove the key if the model loads without them",
}


@dataclass
class Conversion:
    """What became of a document.

    Attributes:
        tree: of a cluster.yaml.
        changes: what differs for the one who knows the document, one line each, with its place in it.
    """

    tree: Tree
    changes: list[str] = field(default_factory=list)


def read_ray_llm(path: Path, check: Callable[[Tree], None] = check_llm_config) -> Conversion:
    """The configuration that says what the file ``path`` says.

    Args:
        check: raises ConfigError for what is no LLMConfig.

    Raises ConfigError for a file that cannot be read or taken over; it names every reason of a model at once.
    """
    found = read_file(path)
    reader = _Reader(found.http, found.changes)
    for at, config in found.configs.items():
        check(config)
        reader.model(config, at)
    reader.ingress(found.ingress)
    if reader.refused:
        raise ConfigError(f"{path} cannot be taken over:\n" + "\n".join(f"  {line}" for line in reader.refused))
    tree = reader.tree()
    validated(tree, f"what was made from {path}")
    return Conversion(tree, found.changes)


class _Reader:
    """Collects the models, the changes and what is refused, over all LLMConfigs."""

    def __init__(self, http: Tree, changes: list[str]) -> None:
        self.refused: list[str] = []
        self._http, self._changes = http, changes
        self._models: list[Tree] = []

    def tree(self) -> Tree:
        tree: Tree = {"models": self._models} | ({"http": self._http} if self._http else {})
        if "host" in self._http and not HttpConfig(host=self._http["host"]).is_local:
            tree["auth"] = {"allow_open": True}
            self._changes.append(
                f"auth.allow_open: true, because others reach {self._http['host']} and Ray Serve asks for no keys; "
                "better make some with `ellm keys create` and set auth.keys_file"
            )
        return tree

    def model(self, config: Tree, at: str) -> None:
        """Take over one LLMConfig."""
        model: Tree = {}
        self._models.append(model)
        self._source(model, config.get("model_loading_config") or {}, at)
        engine = dict(config.get("engine_kwargs") or {})
        self._engine(model, engine, f"{at}engine_kwargs.")
        deployment = dict(config.get("deployment_config") or {})
        self._replicas(model, deployment, f"{at}deployment_config.")
        for key in deployment:
            why = _DROPPED_DEPLOYMENT.get(key, "the cluster sets what it needs of its deployments")
            self._drop(f"{at}deployment_config.{key}", why)
        self._rest(config, at)

    def ingress(self, arguments: Tree) -> None:
        """Take over what LLMServingArgs says of the API."""
        options = dict(arguments.get("ingress_deployment_config") or {})
        scaling = options.pop("autoscaling_config", None) or {}
        number = options.pop("num_replicas", None) or scaling.get("min_replicas")
        if isinstance(number, int) and number > 0:
            self._http["ingress_replicas"] = number
        for key in [*options, *(f"autoscaling_config.{key}" for key in scaling if key != "min_replicas")]:
            self._drop(f"ingress_deployment_config.{key}", "http.ingress_replicas processes serve the API")
        if arguments.get("ingress_cls_config"):
            self._drop("ingress_cls_config", "the API is vLLM's own server")

    def _source(self, model: Tree, loading: Mapping[str, Any], at: str) -> None:
        source = loading.get("model_source") or loading.get("model_id")
        bucket = source.get("bucket_uri", "it") if isinstance(source, Mapping) else source
        if isinstance(source, Mapping) or "://" in str(source):
            self.refused.append(
                f"{at}model_loading_config.model_source: models come from a folder or the Hugging Face hub; download "
                f"{bucket} to a folder, and name that"
            )
            return
        model["name"], model["source"] = loading.get("model_id"), source
        if tokenizer := loading.get("tokenizer_source"):
            model["engine_args"] = {"tokenizer": tokenizer}

    def _engine(self, model: Tree, given: Tree, at: str) -> None:
        given = {key: value for key, value in given.items() if value is not None}  # null is vLLM's default
        for key in _PARALLEL_ARGS:
            if (size := given.pop(key, 1)) != 1:
                self.refused.append(f"{at}{key}: {size}; a replica spans one device here, so only 1 works")
        for key, why in _REFUSED_ARGS.items():
            if given.pop(key, None):
                self.refused.append(f"{at}{key}: {why}")
        for key in [key for key in _SAME_KEYS if key in given]:
            model[key] = given.pop(key)
        for key in [key for key in _UNSET_ARGS if key not in model]:
            self._changes.append(f"{at}{key}: not set; {_UNSET_ARGS[key]}")
        if dtype := given.pop("dtype", None):
            model["dtype"] = _DTYPES.get(dtype, dtype)
        if ceiling := given.pop("kv_cache_memory_bytes", None):
            model["kv_ceiling"] = ceiling
            self._changes.append(f"{at}kv_cache_memory_bytes: kv_ceiling here, up to which a replica's KV memory grows")
        # As there: tools are refused unless a parser is named.
        model["tool_call_parser"] = given.pop("tool_call_parser", None)
        if given.pop("enable_prefix_caching", True) is False:
            self._drop(f"{at}enable_prefix_caching", "it is always on")
        for key in [key for key in given if key in _DROPPED_ARGS]:
            del given[key]
            self._drop(f"{at}{key}", _DROPPED_ARGS[key])
        for key in [key for key in given if key in _server_args()]:
            del given[key]
            self._drop(f"{at}{key}", _SERVER_ARGS.get(key, "the API is vLLM's server, with that server's defaults"))
        if given:
            model.setdefault("engine_args", {}).update(given)

    def _replicas(self, model: Tree, deployment: Tree, at: str) -> None:
        number = deployment.pop("num_replicas", None)
        scaling = deployment.pop("autoscaling_config", None)
        if number == "auto":
            scaling = _RAY_AUTO | (scaling or {})
        elif scaling is None:
            model["replicas"] = number or 1
            return
        # Ray Serve's own defaults: from one to one.
        bounds = {"min_replicas": scaling.get("min_replicas", 1), "max_replicas": scaling.get("max_replicas", 1)}
        if bounds["max_replicas"] > _MOST_REPLICAS:
            self._changes.append(f"{at}autoscaling_config.max_replicas: {_MOST_REPLICAS}, the most here")
            bounds["max_replicas"] = _MOST_REPLICAS
        if "downscale_delay_s" in scaling:
            bounds["downscale_delay_s"] = float(scaling["downscale_delay_s"])
        model["autoscaling_config"] = bounds
        model["replicas"] = scaling.get("initial_replicas") or max(1, bounds["min_replicas"])
        if scaling.get("initial_replicas") == 0:
            self._changes.append(
                f"{at}autoscaling_config.initial_replicas: {model['replicas']}; a model starts with one"
            )
        if "downscale_delay_s" not in scaling:
            self._changes.append(f"{at}autoscaling_config.downscale_delay_s: not set; 120 s here, 600 s there")
        for key in scaling:
            if key not in (*bounds, "initial_replicas"):
                self._drop(f"{at}autoscaling_config.{key}", "replicas follow the tokens that are asked for")

    def _rest(self, config: Tree, at: str) -> None:
        """Every key but those of the model, the engine and the replicas."""
        for key, why in _REFUSED_KEYS.items():
            if config.get(key):
                self.refused.append(f"{at}{key}: {why}")
        for key, why in _DROPPED_KEYS.items():
            if config.get(key) is not None:
                self._drop(f"{at}{key}", why)
        for key in ("accelerator_config", "accelerator_type", "placement_group_config"):
            if "tpu" in str(config.get(key)).lower():
                self.refused.append(f"{at}{key}: TPUs are not supported; NVIDIA GPUs and CPUs are")
        self._changes += runtime_env_changes(config.get("runtime_env"), at)
        for key, value in (config.get("experimental_configs") or {}).items():
            if key == "num_ingress_replicas" and isinstance(value, int) and value > 0:
                self._http["ingress_replicas"] = max(value, self._http.get("ingress_replicas", 1))
            elif key == "stream_batching_interval_ms":
                self._drop(f"{at}experimental_configs.{key}", "streams are sent as they come")
            else:
                self._drop(f"{at}experimental_configs.{key}", "there is none here")

    def _drop(self, place: str, why: str) -> None:
        self._changes.append(f"{place}: left out; {why}")


@lru_cache
def _server_args() -> frozenset[str]:
    """Arguments of vLLM's API server, which ray.serve.llm takes among those of the engine."""
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    return frozenset(one.name for one in fields(FrontendArgs))
