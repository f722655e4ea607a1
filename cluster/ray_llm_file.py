"""What is in a file of `ray.serve.llm`, in any of the forms that its users have:

    LLMConfig                    model_loading_config: ...
    LLMServingArgs               llm_configs: [LLMConfig, or a file with one], ingress_...
    a list of LLMConfigs
    a Serve configuration        applications: [{import_path: ray.serve.llm:build_openai_app, args: LLMServingArgs}]

Whether an LLMConfig is one, its own model says (``check_llm_config``).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cluster.config_file import ConfigError

Tree = dict[str, Any]

_BUILDERS = "ray.serve.llm:"
_BUILDER = "build_openai_app"
_ARGUMENTS = ("llm_configs", "ingress_cls_config", "ingress_deployment_config")
_OTHER_ARGUMENTS = {
    "prefill_config": "prefill and decode apart (build_pd_openai_app) cannot be taken over: every engine does "
    "both. Convert the LLMConfig under decode_config, with as many replicas as both have",
    "llm_config": "data parallel attention (build_dp_openai_app) cannot be taken over: a replica spans one device. "
    "Convert the LLMConfig under llm_config without data_parallel_size, with as many replicas as it has ranks",
}
_OTHER_BUILDERS = {
    "build_pd_openai_app": _OTHER_ARGUMENTS["prefill_config"],
    "build_dp_openai_app": _OTHER_ARGUMENTS["llm_config"],
}
_OWN_CODE = (
    "An application that builds its LLMConfigs in Python: write them to a file (LLMConfig.model_dump), and give that"
)
SET_UP = "set it up where `ellm serve` is started, or in the image"


@dataclass
class RayLlmFile:
    """A file that was read.

    Attributes:
        configs: LLMConfigs, by their place in the file.
        ingress: what LLMServingArgs says beside them.
        http: ``http`` of the cluster.
        changes: keys around the LLMConfigs that have no place in a cluster, one line each.
    """

    configs: dict[str, Tree]
    ingress: Tree
    http: Tree = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)


def read_file(path: Path) -> RayLlmFile:
    """Raises ConfigError for a file that is none of ray.serve.llm's, or of a kind that cannot be taken over."""
    document = _load(path)
    if "applications" in document:
        return _of_application(document, path)
    if any(key in document for key in (*_ARGUMENTS, *_OTHER_ARGUMENTS)):
        return _of_arguments(document, path)
    return RayLlmFile({"": document}, {})


def check_llm_config(config: Tree) -> None:
    """Raises ConfigError where ray.serve.llm would refuse it, with its reason."""
    from ray.serve.llm import LLMConfig

    try:
        LLMConfig.model_validate(config).get_engine_config()
    except (ValueError, ImportError) as error:
        raise ConfigError(f"ray.serve.llm refuses this LLMConfig: {error}") from error


def runtime_env_changes(runtime_env: Tree | None, at: str) -> Iterator[str]:
    """A line each; variables by their names alone, for their values may be secrets."""
    for key, value in (runtime_env or {}).items():
        names = f" ({', '.join(value)})" if key == "env_vars" else ""
        yield f"{at}runtime_env.{key}{names}: left out; {SET_UP}"


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


def _of_arguments(arguments: Tree, path: Path) -> RayLlmFile:
    """Of LLMServingArgs."""
    for key, why in _OTHER_ARGUMENTS.items():
        if key in arguments:
            raise ConfigError(f"{path}: {why}")
    if unknown := [key for key in arguments if key not in _ARGUMENTS]:
        raise ConfigError(f"{path}: ray.serve.llm has no {', '.join(unknown)} beside {', '.join(_ARGUMENTS)}")
    entries = arguments.get("llm_configs")
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: llm_configs should be a list of LLMConfigs")
    configs = {}
    for number, entry in enumerate(entries):
        # As ray.serve.llm does: a text names a file.
        config = _load(Path(entry)) if isinstance(entry, str) else entry
        if not isinstance(config, dict):
            raise ConfigError(f"{path}: llm_configs[{number}] should be an LLMConfig or the path of one")
        configs[f"llm_configs[{number}]." if len(entries) > 1 else ""] = config
    return RayLlmFile(configs, {key: value for key, value in arguments.items() if key != "llm_configs"})


def _of_application(document: Tree, path: Path) -> RayLlmFile:
    """Of a Serve configuration."""
    applications = [one for one in document["applications"] or [] if isinstance(one, dict)]
    builders = [_builder(one) for one in applications]
    for builder in builders:
        if why := _OTHER_BUILDERS.get(builder):
            raise ConfigError(f"{path}: {why}")
    if builders.count(_BUILDER) != 1:
        raise ConfigError(
            f"{path}: the Serve configuration should have one application with import_path: {_BUILDERS}{_BUILDER}, "
            f"found {builders.count(_BUILDER)}. Several: put all llm_configs into one. {_OWN_CODE}"
        )
    ours = applications[builders.index(_BUILDER)]
    arguments = ours.get("args") or {}
    if not isinstance(arguments, dict):
        raise ConfigError(f"{path}: args of the application should hold llm_configs")
    found = _of_arguments(arguments, path)
    options = document.get("http_options") or {}
    found.http.update({key: options[key] for key in ("host", "port") if key in options})
    found.changes += [
        f"applications: {one.get('name', 'one')!r} is left out; it is no application of ray.serve.llm"
        for one in applications
        if one is not ours
    ]
    found.changes += [
        f"http_options.{key}: left out; the API has its own server" for key in options if key not in found.http
    ]
    if "host" not in options:
        found.changes.append("http_options.host: not set; 127.0.0.1 here, where Ray Serve takes 0.0.0.0 on a cluster")
    found.changes += [
        f"{key}: left out; the cluster sets it" for key in document if key not in ("applications", "http_options")
    ]
    found.changes += _application_changes(ours)
    return found


def _application_changes(application: Tree) -> Iterator[str]:
    for key, value in application.items():
        if key in ("import_path", "args") or (key == "route_prefix" and value == "/"):
            continue
        if key == "route_prefix":
            yield f"route_prefix: left out; the paths of the API begin with /v1, not with {value}"
        elif key == "runtime_env":
            yield from runtime_env_changes(value, "")
        else:
            yield f"{key}: left out; the cluster sets it"


def _builder(application: Tree) -> str:
    """The name of ray.serve.llm's function that builds the application; "" where it is built by another."""
    module, _, name = str(application.get("import_path", "")).replace(":", ".").rpartition(".")
    return name if f"{module}:" == _BUILDERS else ""
