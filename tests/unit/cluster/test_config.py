"""The configuration file: what it means, and what is said of one that does not fit."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import ClusterConfig, ModelConfig, name_of_source, parse_size
from cluster.config_file import ConfigError, example_config, load_config, parse_config


def problem(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "c.yaml")
    return str(caught.value)


def test_the_example_says_the_defaults() -> None:
    """The printed example loads, and changes nothing."""
    assert parse_config(example_config(), "example") == ClusterConfig()


def test_the_example_explains_every_key() -> None:
    """Each key of the example has a comment above it, or above the list entry it begins."""
    lines = example_config().splitlines()
    keys = [number for number, line in enumerate(lines) if ":" in line and not line.lstrip().startswith("#")]
    assert len(keys) > 20
    assert [lines[number] for number in keys if not lines[number - 1].lstrip().startswith("#")] == []


def test_an_empty_file_is_the_default_cluster() -> None:
    """Every key may be left out."""
    assert parse_config("", "c.yaml") == parse_config("models: [{}]", "c.yaml") == ClusterConfig()


def test_a_misspelt_key_is_refused_with_its_neighbour() -> None:
    """An unknown key is named by its path and line, with the key that was meant and those that exist."""
    said = problem("models:\n  - name: a\n    replica: 3\n")
    assert "models[0].replica (line 3): unknown key; did you mean 'replicas'?" in said
    assert "max_model_len" in said


@pytest.mark.parametrize(
    ("text", "path", "found", "fits"),
    [
        ("models: [{replicas: two}]", "models[0].replicas", "'two' (text)", "integer"),
        ("models: [{}, {name: b, replicas: '2'}]", "models[1].replicas", "'2' (text)", "integer"),
        ("models: [{replicas: 0}]", "models[0].replicas", "0 (a number)", "greater than or equal to 1"),
        ('models: [{name: "a\\nb"}]', "models[0].name", "'a\\nb' (text)", "printable"),
        ('models: [{name: "a\\e[31m"}]', "models[0].name", "'a\\x1b[31m' (text)", "printable"),
        ('models: [{name: "\\u202ea"}]', "models[0].name", "'\\u202ea' (text)", "printable"),
        ('models: [{source: "/a/b\\tc"}]', "models[0].name", "'b\\tc' (text)", "key name"),
        ("models: [{dtype: int4}]", "models[0].dtype", "'int4'", "'bfloat16'"),
        ("models: [{elastic: 'no'}]", "models[0].elastic", "'no' (text)", "boolean"),
        ("models: [{max_model_len: true}]", "models[0].max_model_len", "True (a truth value)", "integer"),
        ("models: [{tensor_parallel_size: 2}]", "models[0].tensor_parallel_size", "2 (a number)", "should be 1"),
        ("memory: {budget: 3 apples}", "memory.budget", "'3 apples'", '"2GiB"'),
        ("memory: {budget: -1}", "memory.budget", "-1 (a number)", "greater than or equal to 1"),
        ("http: {port: 99999}", "http.port", "99999 (a number)", "65535"),
        (
            "models: [{autoscaling_config: {min_replicas: -1}}]",
            "models[0].autoscaling_config.min_replicas",
            "-1 (a number)",
            "greater than or equal to 0",
        ),
        ("routing: {policy: fastest}", "routing.policy", "'fastest'", "'predicted' or 'load'"),
        ("http: 80", "http", "80 (a number)", "HttpConfig"),
        ("slo: [{name: a, ttft_ms: 0}]", "slo[0].ttft_ms", "0 (a number)", "greater than 0"),
        ("models: 3", "models", "3 (a number)", "list"),
        ("models: []", "models", "[] (a list)", "at least 1"),
    ],
)
def test_a_wrong_value_is_refused(text: str, path: str, found: str, fits: str) -> None:
    """A wrong type or value is named by its dotted path, with what was found and what would fit."""
    said = problem(text)
    assert f"{path} (line 1): found {found}" in said
    assert fits in said


def test_every_problem_is_reported_at_once() -> None:
    """Three mistakes are three lines, each with the line of the file."""
    said = problem("http:\n  port: 0\nmemory:\n  budget: much\nmodels:\n- replicas: 99\n")
    assert [f"(line {number})" in said for number in (2, 4, 6)] == [True] * 3


def test_a_vllm_argument_that_we_decide_is_refused() -> None:
    """engine_args cannot contradict a key of the model; the message names the key to use."""
    assert "engine_args.kv_cache_memory_bytes cannot be set here: use the key kv_ceiling" in problem(
        "models: [{engine_args: {kv_cache_memory_bytes: 5}}]"
    )


def test_settings_that_contradict_each_other_are_refused() -> None:
    """A step must have room for one token of every running request, names must differ, and what runs no engine has no
    elastic memory."""
    assert "max_num_batched_tokens (2048) should be at least max_num_seqs (4096)" in problem(
        "models: [{max_num_seqs: 4096}]"
    )
    assert "two entries of models are named 'a'" in problem("models: [{name: a}, {name: a}]")
    assert "set elastic: false" in problem("models: [{paced_tokens_per_s: 50.0}]")


def test_a_key_that_is_there_twice_is_refused() -> None:
    """YAML would silently take the last one."""
    assert "http.port (line 3): the key is there twice" in problem("http:\n  port: 1\n  port: 2\n")


@pytest.mark.parametrize("text", ["a: [", "3", "- a", "? [a]\n: b", "&x [*x]"])
def test_what_is_no_configuration_is_refused(text: str) -> None:
    """Broken YAML, a bare value, a list, a key that is no text: each is a ConfigError and nothing else."""
    assert "c.yaml" in problem(text)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    """A missing file, a folder and bytes that are no text: each says which file."""
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "binary"):
        with pytest.raises(ConfigError, match=str(path)):
            load_config(path)


def test_sizes_have_units() -> None:
    """KiB counts by 1024, KB by 1000, a number is bytes, and auto is None."""
    sizes = ["512MiB", "1.5 GB", "2 KiB", 7, "9", "auto", None]
    assert [parse_size(size) for size in sizes] == [512 << 20, 1_500_000_000, 2048, 7, 9, None, None]


@given(st.integers(0, 10**15))
def test_whole_numbers_of_bytes_survive(size: int) -> None:
    """A size written as a number of bytes is that number, as text too."""
    assert parse_size(size) == parse_size(f"{size}B") == size


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("default", "SmolLM2-135M-Instruct"),
        ("/models/llama-3/", "llama-3"),
        ("./mine", "mine"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("gpt2", "gpt2"),
    ],
)
def test_a_model_without_a_name_is_called_after_its_source(source: str, name: str) -> None:
    """A folder gives its last part, a hub id stays whole."""
    assert name_of_source(source) == name
    assert parse_config(yaml.safe_dump({"models": [{"source": source}]}), "c").models[0].name == name


@pytest.mark.parametrize(
    ("model", "replicas", "least", "most"),
    [
        ("{}", 2, 2, 2),
        ("{replicas: 3}", 3, 3, 3),
        ("{autoscaling_config: {max_replicas: 4}}", 2, 2, 4),
        ("{autoscaling_config: {min_replicas: 0, max_replicas: 1}}", 1, 0, 1),
        ("{autoscaling_config: {min_replicas: 3, max_replicas: 5}}", 3, 3, 5),
        ("{replicas: 4, autoscaling_config: {min_replicas: 0}}", 4, 0, 4),
    ],
)
def test_replicas_have_bounds(model: str, replicas: int, least: int, most: int) -> None:
    """What is left out follows from what is there, and means the same when it is written out."""
    found = parse_config(f"models: [{model}]", "c").models[0]
    for one in (found, ModelConfig.model_validate(found.model_dump())):
        assert (one.replicas, one.least_replicas, one.most_replicas) == (replicas, least, most)
        assert one.scales == (least < most)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("{autoscaling_config: {min_replicas: 5, max_replicas: 2}}", "max_replicas (2) should be at least"),
        ("{replicas: 8, autoscaling_config: {max_replicas: 2}}", "replicas (8) should be at least"),
    ],
)
def test_replicas_outside_their_bounds_are_refused(model: str, says: str) -> None:
    """The error has both numbers."""
    assert says in problem(f"models: [{model}]")
