"""Engine profiles as data."""

from pathlib import Path

import msgspec
import pytest

from memory_agent.errors import SettingsError
from replicas.engine_profile import load_profile, profile_names, save_profile


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_loads_and_names_its_source(name: str) -> None:
    """What comes with the project can be read, says where it is from, and holds its longest request."""
    profile = load_profile(name)
    assert profile.name == name and len(profile.source) > 40
    assert profile.kv_tokens >= profile.max_model_len


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    """What is written is what is read."""
    profile = load_profile("llama-3.1-8b-h100")
    save_profile(profile, tmp_path / "one.yaml")
    assert load_profile(str(tmp_path / "one.yaml")) == profile


def test_an_unknown_name_is_answered_with_those_that_exist() -> None:
    """The error lists what would have worked."""
    with pytest.raises(SettingsError, match=r"give one of .*llama-3.1-8b-h100.*or a YAML file"):
        load_profile("llama-9")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device_bytes": -1}, "device_bytes is -1, it should be 0 or more"),
        ({"device_bytes": 1 << 30}, "raise device_bytes, or lower max_model_len"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0, it should be above 0"),
        ({"max_num_batched_tokens": 8}, "max_num_batched_tokens is 8, it should be at least max_num_seqs"),
        ({"step_time": {"step_s": float("nan")}}, "step_time.step_s is nan"),
        ({"colour": "red"}, "unknown field `colour`"),
        ({"weights_bytes": "many"}, "Expected `int`, got `str`"),
    ],
)
def test_nonsense_is_refused_by_its_key(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    """A value that no engine can have is named with what it should be."""
    tree = msgspec.to_builtins(load_profile("llama-3.1-8b-h100")) | changes
    path = tmp_path / "bad.yaml"
    path.write_bytes(msgspec.yaml.encode(tree))
    with pytest.raises(SettingsError, match=words):
        load_profile(str(path))
