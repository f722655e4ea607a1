"""A cluster's configuration from that of `ray.serve.llm`: what is kept, and each change with its reason.

    LLMConfig                    model_loading_config: ...
    LLMServingArgs               llm_configs: [LLMConfig, or a file with one]
    a Serve configuration        applications: [{import_path: ray.serve.llm:build_openai_app, args: LLMServingArgs}]

Every key is taken over, named as a change, or refused; none is dropped in silence. Whether a document is one of
ray.serve.llm's at all, its own model says (``check_llm_config``).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cluster.config_file import ConfigError, validated

Tree = dict[str, Any]

_IMPORT_PATH = "ray.serve.llm:build_openai_app"
_MOST_REPLICAS = 32
_RAY_AUTO = {"min_replicas": 1, "max_replicas": 100}
_DTYPES = {"half": "float16", "float": "float32"}
_SAME_KEYS = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "async_scheduling", "reasoning_parser")
_DROPPED_ARGS = {
    "gpu_memory_utilization": "engines share memory.budget, by default all that is free",
    "distributed_executor_backend": "each replica starts its own worker",
    "enable_auto_tool_choice": "it is on where there is a tool_call_parser",
    "kv_transfer_config": "the KV cache is elastic; for a buffer in host memory set memory.host_buffer",
    "disable_log_stats": "statistics are always kept",
    "scheduler_cls": "the elastic scheduler is used",
    "worker_cls": "the elastic worker is used",
}
_PARALLEL_ARGS = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
_DROPPED_KEYS = {
    "accelerator_type": "engines run on what this machine has",
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


def read_ray_llm(path: Path, check: Callable[[Tree], None] | None = None) -> Conversion:
    """The configuration that says what the file ``path`` says.

    Args:
        check: raises ConfigError for what is no LLMConfig; ray.serve.llm's own model by default.

    Raises ConfigError for a file that cannot be read or taken over; it names every reason of a model at once.
    """
    document = _load(path)
    arguments, http, changes = _arguments(document)
    entries = arguments.get("llm_configs")
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: llm_configs should be a list of LLMConfigs")
    reader = _Reader(http, changes)
    for number, entry in enumerate(entries):
        # As ray.serve.llm does: a text names a file.
        config = _load(Path(entry)) if isinstance(entry, str) else entry
        if not isinstance(config, dict):
            raise ConfigError(f"{path}: llm_configs[{number}] should be an LLMConfig or the path of one")
        (check or check_llm_config)(config)
        reader.model(config, f"llm_configs[{number}]." if len(entries) > 1 else "")
    reader.ingress(arguments)
    if reader.refused:
        raise ConfigError(f"{path} cannot be taken over:\n" + "\n".join(f"  {line}" for line in reader.refused))
    tree = reader.tree()
    validated(tree, f"what was made from {path}")
    return Conversion(tree, changes)


def check_llm_config(config: Tree) -> None:
    """Raises ConfigError where ray.serve.llm would refuse it, with its reason."""
    from pydantic import ValidationError
    from ray.serve.llm import LLMConfig

    try:
        LLMConfig.model_validate(config)
    except (ValidationError, ValueError, ImportError) as error:
        raise ConfigError(f"ray.serve.llm refuses this LLMConfig: {error}") from error


def _load(path: Path) -> Tree:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if isinstance(document, list):
        return {"llm_configs": document}
    if not isinstance(document, dict):
        raise ConfigError(f"{path} should hold an LLMConfig, llm_configs: or a Serve configuration")
    return document


def _arguments(document: Tree) -> tuple[Tree, Tree, list[str]]:
    """LLMServingArgs, ``http`` of the cluster, and changes."""
    if "applications" not in document:
        return (document if "llm_configs" in document else {"llm_configs": [document]}), {}, []
    applications = document["applications"] or []
    ours = [one for one in applications if isinstance(one, dict) and one.get("import_path") == _IMPORT_PATH]
    if len(ours) != 1:
        raise ConfigError(
            f"the Serve configuration should have one application with import_path: {_IMPORT_PATH}, found {len(ours)}"
        )
    changes = [
        f"applications: {one.get('name', 'one')!r} is left out; it is no application of ray.serve.llm"
        for one in applications
        if one is not ours[0]
    ]
    options = document.get("http_options") or {}
    http = {key: options[key] for key in ("host", "port") if key in options}
    changes += [f"http_options.{key}: left out; the API has its own server" for key in options if key not in http]
    kept = ("import_path", "args", "name")
    changes += [f"{key}: left out; the cluster sets it" for key in ours[0] if key not in kept]
    changes += [
        f"{key}: left out; the cluster sets it" for key in document if key not in ("applications", "http_options")
    ]
    return ours[0].get("args") or {}, http, changes


class _Reader:
    """Collects the models, the changes and what is refused, over all LLMConfigs."""

    def __init__(self, http: Tree, changes: list[str]) -> None:
        self.refused: list[str] = []
        self._http, self._changes = http, changes
        self._models: list[Tree] = []

    def tree(self) -> Tree:
        return {"models": self._models} | ({"http": self._http} if self._http else {})

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
            self._change(f"{at}deployment_config.{key}", why)
        self._rest(config, at)

    def ingress(self, arguments: Tree) -> None:
        """Take over what LLMServingArgs says of the API."""
        options = dict(arguments.get("ingress_deployment_config") or {})
        scaling = options.pop("autoscaling_config", None) or {}
        number = options.pop("num_replicas", None) or scaling.get("min_replicas")
        if isinstance(number, int) and number > 0:
            self._http["ingress_replicas"] = number
        for key in [*options, *(f"autoscaling_config.{key}" for key in scaling if key != "min_replicas")]:
            self._change(f"ingress_deployment_config.{key}", "http.ingress_replicas processes serve the API")
        if arguments.get("ingress_cls_config"):
            self._change("ingress_cls_config", "the API is vLLM's own server")

    def _source(self, model: Tree, loading: Mapping[str, Any], at: str) -> None:
        source = loading.get("model_source") or loading.get("model_id")
        if isinstance(source, Mapping):
            self.refused.append(
                f"{at}model_loading_config.model_source: models come from a folder or the Hugging Face hub; download "
                f"{source.get('bucket_uri', 'it')} to a folder, and name that"
            )
            return
        model["name"], model["source"] = loading.get("model_id"), source
        if tokenizer := loading.get("tokenizer_source"):
            model["engine_args"] = {"tokenizer": tokenizer}

    def _engine(self, model: Tree, given: Tree, at: str) -> None:
        for key in _PARALLEL_ARGS:
            if (size := given.pop(key, 1)) not in (1, None):
                self.refused.append(f"{at}{key}: {size}; a replica spans one device here, so only 1 works")
        for key in _SAME_KEYS:
            if key in given:
                model[key] = given.pop(key)
        if "dtype" in given:
            dtype = given.pop("dtype")
            model["dtype"] = _DTYPES.get(dtype, dtype)
        if given.get("kv_cache_memory_bytes") is not None:
            model["kv_ceiling"] = given.pop("kv_cache_memory_bytes")
            self._changes.append(f"{at}kv_cache_memory_bytes: kv_ceiling here, up to which a replica's KV memory grows")
        if "tool_call_parser" in given:
            model["tool_call_parser"] = given.pop("tool_call_parser")
        else:
            model["tool_call_parser"] = None  # as there: tools are refused unless a parser is named
        if given.pop("enable_prefix_caching", True) is False:
            self._change(f"{at}enable_prefix_caching", "it is always on")
        for key in [key for key in given if key in _DROPPED_ARGS]:
            del given[key]
            self._change(f"{at}{key}", _DROPPED_ARGS[key])
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
        for key in scaling:
            if key not in (*bounds, "initial_replicas"):
                self._change(f"{at}autoscaling_config.{key}", "replicas follow the tokens that are asked for")

    def _rest(self, config: Tree, at: str) -> None:
        """Every key but those of the model, the engine and the replicas."""
        for key, why in _REFUSED_KEYS.items():
            if config.get(key):
                self.refused.append(f"{at}{key}: {why}")
        for key, why in _DROPPED_KEYS.items():
            if config.get(key) is not None:
                self._change(f"{at}{key}", why)
        kind = (config.get("accelerator_config") or {}).get("kind")
        if kind == "tpu":
            self.refused.append(f"{at}accelerator_config: TPUs are not supported; NVIDIA GPUs and CPUs are")
        elif kind is not None:
            self._change(f"{at}accelerator_config", "engines run on what this machine has")
        for key, value in (config.get("runtime_env") or {}).items():
            names = f" ({', '.join(value)})" if key == "env_vars" else ""
            self._change(f"{at}runtime_env.{key}{names}", "set it up where `ellm serve` is started, or in the image")
        for key, value in (config.get("experimental_configs") or {}).items():
            if key == "num_ingress_replicas" and isinstance(value, int) and value > 0:
                self._http["ingress_replicas"] = max(value, self._http.get("ingress_replicas", 1))
            else:
                self._change(f"{at}experimental_configs.{key}", "streams are sent as they come")

    def _change(self, place: str, why: str) -> None:
        self._changes.append(f"{place}: left out; {why}")
