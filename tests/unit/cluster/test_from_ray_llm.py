"""Configurations of ray.serve.llm, as its users write them, become ours: what is kept, what is named and refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.llm import LLMConfig
from typer.testing import CliRunner

from cluster.cli import app
from cluster.config import ClusterConfig
from cluster.config_file import ConfigError, parse_config, validated
from cluster.from_ray_llm import Conversion, read_ray_llm
from cluster.ray_llm_file import check_llm_config
from tests.unit.cluster.test_cli import ellm

ONE = """
model_loading_config:
  model_id: qwen
  model_source: Qwen/Qwen3-0.6B
engine_kwargs:
  max_model_len: 4096
  max_num_seqs: 32
  dtype: half
  enforce_eager: true
  gpu_memory_utilization: 0.9
accelerator_type: A10G
deployment_config:
  autoscaling_config: {min_replicas: 1, max_replicas: 4, target_ongoing_requests: 64}
runtime_env:
  env_vars: {HF_TOKEN: secret}
"""
SERVE = f"""
http_options: {{host: 0.0.0.0, port: 9000}}
applications:
  - name: llm
    route_prefix: /
    import_path: ray.serve.llm:build_openai_app
    args:
      llm_configs:
        - {ONE.strip().replace(chr(10), chr(10) + " " * 10)}
        - model_loading_config: {{model_id: HuggingFaceTB/SmolLM2-135M-Instruct}}
          engine_kwargs: {{tool_call_parser: hermes, enable_auto_tool_choice: true}}
          deployment_config: {{num_replicas: 3}}
      ingress_deployment_config: {{autoscaling_config: {{min_replicas: 2, max_replicas: 8}}}}
"""
ALL_KEYS: dict[str, Any] = {
    "runtime_env": {"env_vars": {"A": "b"}},
    "model_loading_config": {"model_id": "a"},
    "llm_engine": "vLLM",
    "engine_kwargs": {"max_model_len": 4096, "max_num_seqs": 32},
    "accelerator_type": "L4",
    "accelerator_config": {"kind": "gpu"},
    "placement_group_config": {"bundles": [{"GPU": 1}]},
    "lora_config": {"dynamic_lora_loading_path": "s3://bucket/adapters"},
    "deployment_config": {"num_replicas": 2},
    "server_cls": "ray.serve.llm:LLMServer",
    "experimental_configs": {"stream_batching_interval_ms": 0},
    "log_engine_metrics": True,
    "callback_config": {"callback_class": "a:B"},
}
SILENT = {"llm_engine", "model_loading_config", "engine_kwargs", "deployment_config"}
"""Kept, so nothing is said of them; ray.serve.llm has one engine."""


def convert(tmp_path: Path, text: str, checked: bool = True) -> tuple[ClusterConfig, Conversion]:
    file = tmp_path / "ray.yaml"
    file.write_text(text)
    found = read_ray_llm(file) if checked else read_ray_llm(file, lambda config: None)
    return validated(found.tree, "test"), found


def test_an_llm_config(tmp_path: Path) -> None:
    """Model, lengths, types and bounds are kept; what cannot be is named with its place and its reason."""
    config, found = convert(tmp_path, ONE)
    (model,) = config.models
    assert (model.name, model.source, model.dtype) == ("qwen", "Qwen/Qwen3-0.6B", "float16")
    assert (model.max_model_len, model.max_num_seqs) == (4096, 32)
    assert (model.least_replicas, model.replicas, model.most_replicas) == (1, 1, 4)
    assert model.engine_args == {"enforce_eager": True}
    assert model.tool_call_parser is None, "ray.serve.llm refuses tools without a parser"
    places = [line.partition(":")[0] for line in found.changes]
    assert sorted(places) == [
        "accelerator_type",
        "deployment_config.autoscaling_config.downscale_delay_s",
        "deployment_config.autoscaling_config.target_ongoing_requests",
        "engine_kwargs.gpu_memory_utilization",
        "runtime_env.env_vars (HF_TOKEN)",
    ]
    assert not any("secret" in line for line in found.changes)


def test_a_serve_configuration(tmp_path: Path) -> None:
    """All models of its application, its address, and the number of its ingress processes."""
    config, found = convert(tmp_path, SERVE)
    assert [model.name for model in config.models] == ["qwen", "HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert config.models[1].source == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config.models[1].tool_call_parser == "hermes" and config.models[1].replicas == 3
    assert (config.http.host, config.http.port, config.http.ingress_replicas) == ("0.0.0.0", 9000, 2)
    assert config.auth.allow_open and any(line.startswith("auth.allow_open: true") for line in found.changes)
    assert "ingress_deployment_config.autoscaling_config.max_replicas" in "\n".join(found.changes)
    assert any(line.startswith("llm_configs[0].accelerator_type") for line in found.changes)


def test_configs_in_files_of_their_own(tmp_path: Path) -> None:
    """A text in llm_configs is a path, as there; a list alone is llm_configs."""
    (tmp_path / "one.yaml").write_text(ONE)
    for text in (f"llm_configs: [{tmp_path}/one.yaml]", f"[{tmp_path}/one.yaml]"):
        config, _ = convert(tmp_path, text)
        assert config.models[0].name == "qwen"


def test_every_key_of_an_llm_config_is_kept_named_or_refused(tmp_path: Path) -> None:
    """Those of the Ray that is installed: a new release's new key has to be looked at."""
    assert set(ALL_KEYS) == set(LLMConfig.model_fields)
    for key, value in ALL_KEYS.items():
        kept = {one: ALL_KEYS[one] for one in ("model_loading_config", "engine_kwargs")}
        text = yaml.safe_dump(kept | {key: value})
        try:
            _, found = convert(tmp_path, text, checked=False)
            said = "\n".join(found.changes)
        except ConfigError as error:
            said = str(error)
        assert (key in said) is not (key in SILENT), said


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("engine_kwargs: {tensor_parallel_size: 2}", r"tensor_parallel_size: 2; .*only 1 works"),
        ("lora_config: {dynamic_lora_loading_path: 's3://b/a'}", "LoRA adapters are not loaded"),
        ("accelerator_config: {kind: tpu}", "TPUs are not supported"),
        ("llm_engine: SGLang", "ray.serve.llm refuses.*Unsupported engine"),
        ("accelerator_type: X9000", "ray.serve.llm refuses.*X9000"),
        ("deployment_config: {num_replicas: many}", "ray.serve.llm refuses"),
        ("engine_kwarg: {}", "ray.serve.llm refuses.*engine_kwarg"),
        ("engine_kwargs: {max_model_length: 5}", "ray.serve.llm refuses.*max_model_length"),
        ("engine_kwargs: {api_key: [secret]}", "api_key: keys are in a file of their own"),
        ("accelerator_type: TPU-V6E", "accelerator_type: TPUs are not supported"),
        ("placement_group_config: {bundles: [{TPU: 4}]}", "placement_group_config: TPUs are not supported"),
        ("model_loading_config: {model_id: a, model_source: 'gs://bucket/m'}", "download gs://bucket/m to a folder"),
    ],
)
def test_what_cannot_be_taken_over_is_refused(tmp_path: Path, change: str, complaint: str) -> None:
    """With ray.serve.llm's reason where it would refuse it itself."""
    with pytest.raises(ConfigError, match=f"(?s){complaint}"):
        convert(tmp_path, yaml.safe_dump({"model_loading_config": {"model_id": "a"}} | yaml.safe_load(change)))


def test_all_reasons_are_named_at_once(tmp_path: Path) -> None:
    """A bucket too."""
    source = "{model_id: a, model_source: {bucket_uri: 's3://bucket/model'}}"
    with pytest.raises(ConfigError) as caught:
        convert(tmp_path, f"model_loading_config: {source}\nengine_kwargs: {{pipeline_parallel_size: 2}}")
    assert "s3://bucket/model to a folder" in str(caught.value) and "pipeline_parallel_size" in str(caught.value)


@pytest.mark.parametrize(
    ("deployment", "least", "start", "most"),
    [
        ({}, 1, 1, 1),
        ({"num_replicas": 4}, 4, 4, 4),
        ({"num_replicas": "auto"}, 1, 1, 32),
        ({"autoscaling_config": {"min_replicas": 0, "max_replicas": 3}}, 0, 1, 3),
        ({"autoscaling_config": {"min_replicas": 2, "initial_replicas": 3, "max_replicas": 5}}, 2, 3, 5),
        ({"autoscaling_config": {}}, 1, 1, 1),
    ],
)
def test_replicas(tmp_path: Path, deployment: dict[str, Any], least: int, start: int, most: int) -> None:
    """As many as there, which is one where nothing is said."""
    text = yaml.safe_dump({"model_loading_config": {"model_id": "a"}, "deployment_config": deployment})
    (model,) = convert(tmp_path, text)[0].models
    assert (model.least_replicas, model.replicas, model.most_replicas) == (least, start, most)


def test_arguments_of_the_server_are_named(tmp_path: Path) -> None:
    """ray.serve.llm takes them among the engine's, where vLLM's engine knows none of them; null is as if unsaid."""
    kwargs = {"chat_template": "t.jinja", "response_role": "bot", "dtype": None, "max_num_seqs": None, "seed": 3}
    config, found = convert(
        tmp_path, yaml.safe_dump({"model_loading_config": {"model_id": "a"}, "engine_kwargs": kwargs})
    )
    assert config.models[0].engine_args == {"seed": 3} and config.models[0].max_num_seqs == 64
    said = "\n".join(found.changes)
    assert "engine_kwargs.chat_template: left out; the checkpoint's own" in said
    assert "engine_kwargs.response_role: left out" in said


def test_defaults_that_differ_are_named(tmp_path: Path) -> None:
    """Where nothing is said of them, and only there."""
    scaling = "{min_replicas: 0, initial_replicas: 0, max_replicas: 2}"
    text = f"model_loading_config: {{model_id: a}}\ndeployment_config: {{autoscaling_config: {scaling}}}"
    changes = convert(tmp_path, text)[1].changes
    assert any("initial_replicas: 1; a model starts with one" in line for line in changes)
    said = [line.partition(": not set")[0] for line in changes if ": not set" in line]
    assert [place.rpartition(".")[2] for place in said] == ["max_model_len", "max_num_seqs", "downscale_delay_s"]
    text = SERVE.replace("http_options: {host: 0.0.0.0, port: 9000}", "")
    assert any(line.startswith("http_options.host: not set; 127.0.0.1") for line in convert(tmp_path, text)[1].changes)
    assert not any("http_options.host" in line for line in convert(tmp_path, SERVE)[1].changes)


def test_what_a_serve_configuration_says_around_it(tmp_path: Path) -> None:
    """Every key of the file, of its application and of LLMServingArgs is kept or named; no secret is shown."""
    tree = yaml.safe_load(SERVE)
    tree |= {"proxy_location": "EveryNode", "grpc_options": {"port": 1}}
    tree["http_options"]["keep_alive_timeout_s"] = 5
    application = tree["applications"][0]
    application |= {
        "import_path": "ray.serve.llm.build_openai_app",
        "route_prefix": "/chat",
        "runtime_env": {"env_vars": {"HF_TOKEN": "secret"}, "pip": ["x"]},
        "deployments": [{"name": "a"}],
    }
    application["args"]["ingress_cls_config"] = {"ingress_extra_kwargs": {"a": 1}}
    tree["applications"].append({"name": "other", "import_path": "a:b"})
    said = "\n".join(convert(tmp_path, yaml.safe_dump(tree))[1].changes)
    for place in (
        "proxy_location: left out",
        "grpc_options: left out",
        "http_options.keep_alive_timeout_s: left out",
        "name: left out",
        "route_prefix: left out; the paths of the API begin with /v1, not with /chat",
        "runtime_env.env_vars (HF_TOKEN): left out",
        "runtime_env.pip: left out",
        "deployments: left out",
        "ingress_cls_config: left out",
        "'other' is left out",
    ):
        assert place in said
    assert "secret" not in said


@pytest.mark.parametrize(
    ("tree", "complaint"),
    [
        ({"prefill_config": {}, "decode_config": {}}, "Convert the LLMConfig under decode_config"),
        ({"llm_config": {}}, "Convert the LLMConfig under llm_config"),
        ({"applications": [{"import_path": "ray.serve.llm:build_pd_openai_app", "args": {}}]}, "under decode_config"),
        ({"applications": [{"import_path": "ray.serve.llm:build_dp_openai_app"}]}, "without data_parallel_size"),
        (
            {"applications": [{"import_path": "mine:app"}]},
            "one application with import_path.*found 0.*LLMConfig.model_dump",
        ),
        (
            {"applications": [{"import_path": "ray.serve.llm:build_openai_app"}] * 2},
            "found 2.*all llm_configs into one",
        ),
        ({"llm_configs": [{}], "ingress_config": {}}, "no ingress_config beside llm_configs"),
    ],
)
def test_other_applications_are_refused_with_what_works(tmp_path: Path, tree: dict[str, Any], complaint: str) -> None:
    """Each builder of ray.serve.llm, and one's own."""
    with pytest.raises(ConfigError, match=complaint):
        convert(tmp_path, yaml.safe_dump(tree))


def test_every_builder_is_known() -> None:
    """Those of the Ray that is installed: a new release's new one has to be looked at."""
    import ray.serve.llm

    builders = {name for name in ray.serve.llm.__all__ if name.startswith("build_") and name.endswith("_app")}
    assert builders == {"build_openai_app", "build_pd_openai_app", "build_dp_openai_app"}


@pytest.mark.parametrize("text", ["", "3", "applications: []", "llm_configs: []", "llm_configs: [3]", "a: ["])
def test_no_configuration_of_ray_llm(tmp_path: Path, text: str) -> None:
    """A clear error each."""
    with pytest.raises(ConfigError):
        convert(tmp_path, text)


def test_the_check_is_rays_own() -> None:
    """What it takes passes, what it refuses does not."""
    check_llm_config(yaml.safe_load(ONE))
    with pytest.raises(ConfigError, match="model_loading_config"):
        check_llm_config({"engine_kwargs": {}})


def test_the_command_prints_a_configuration_that_loads(tmp_path: Path) -> None:
    """On standard output the file, beside it the changes; a refusal ends with status 1."""
    file = tmp_path / "ray.yaml"
    file.write_text(ONE)
    code, said = ellm("config", "from-ray-llm", str(file))
    assert code == 0 and "note: accelerator_type: left out" in said
    printed = "\n".join(line for line in said.splitlines() if not line.startswith("note: "))
    assert parse_config(printed, "test").models[0].name == "qwen"
    both = json.loads(CliRunner().invoke(app, ["config", "from-ray-llm", str(file), "--json"]).stdout)
    assert both["config"] == yaml.safe_load(printed)
    assert [f"note: {line}" for line in both["changes"]] == [one for one in said.splitlines() if one.startswith("note")]
    file.write_text("engine_kwargs: {}")
    code, said = ellm("config", "from-ray-llm", str(file))
    assert code == 1 and "ray.serve.llm refuses" in said
