"""What one engine on one machine is made of, for the engine model and for prediction: data, read from YAML.

``replicas/profiles`` holds the ones that come with the project, each with the source of its figures.
"""

import math
from pathlib import Path

import msgspec
import yaml

from memory_agent.errors import SettingsError
from replicas.step_memory import Memory
from replicas.step_time import StepTime

FOLDER = Path(__file__).parent / "profiles"


class HostLink(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The host buffer of one engine.

    Attributes:
        bytes: of KV memory that it holds; 0: there is none.
        bytes_per_s: at which KV blocks are loaded from it.
    """

    bytes: int = 0
    bytes_per_s: float = 1e9


class EngineProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One engine.

    Attributes:
        source: where the figures come from.
        step_time: of its steps.
        memory: bytes of KV blocks and activations.
        device_bytes: for both of these, beside the weights.
        weights_bytes: of the loaded weights.
        max_num_seqs, max_num_batched_tokens, max_model_len: as vLLM's.
        overhead_s: what a request takes outside of steps until its first token: tokenising, routing, hops.
        elastic: KV memory gets what the activations of a step leave; else the largest step's are set aside.
        host: the host buffer.
    """

    name: str
    source: str
    step_time: StepTime
    memory: Memory
    device_bytes: int
    weights_bytes: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    overhead_s: float = 0.0
    elastic: bool = True
    host: HostLink = HostLink()

    @property
    def kv_token_bytes(self) -> float:
        return self.memory.block_bytes / self.memory.block_tokens

    @property
    def kv_blocks(self) -> int:
        """KV blocks that requests can ever hold at once, vLLM's null block not included."""
        least = self.max_num_seqs if self.elastic else self.max_num_batched_tokens
        return max(0, self.memory.blocks(self.device_bytes, least) - 1)

    @property
    def kv_tokens(self) -> int:
        """Tokens that these hold."""
        return self.kv_blocks * self.memory.block_tokens


def profile_names() -> list[str]:
    """Of the profiles that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_profile(name: str) -> EngineProfile:
    """The profile of that name, or of that YAML file. Raises SettingsError, with what would have worked."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        names = ", ".join(profile_names())
        raise SettingsError(f"no engine profile {name!r}: give one of {names}, or a YAML file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"cannot read {path}: {error}") from error
    try:
        return _checked(msgspec.convert(tree, EngineProfile))
    except (msgspec.ValidationError, ValueError) as error:
        raise SettingsError(f"{path} is no engine profile: {error}") from error


def save_profile(profile: EngineProfile, path: Path) -> None:
    """Write a YAML file that ``load_profile`` reads."""
    path.write_text(yaml.safe_dump(msgspec.to_builtins(profile), sort_keys=False, width=100), encoding="utf-8")


def _checked(profile: EngineProfile) -> EngineProfile:
    """Raises ValueError, naming the key, for what no engine can have."""
    positive = {
        "step_time.step_s": profile.step_time.step_s,
        "memory.block_bytes": profile.memory.block_bytes,
        "memory.block_tokens": profile.memory.block_tokens,
        "max_num_seqs": profile.max_num_seqs,
        "max_num_batched_tokens": profile.max_num_batched_tokens,
        "max_model_len": profile.max_model_len,
        "host.bytes_per_s": profile.host.bytes_per_s,
    }
    counts = {
        **{f"step_time.{part}": value for part, value in vars(profile.step_time).items()},
        "memory.token_bytes": profile.memory.token_bytes,
        "memory.step_bytes": profile.memory.step_bytes,
        "device_bytes": profile.device_bytes,
        "weights_bytes": profile.weights_bytes,
        "overhead_s": profile.overhead_s,
        "host.bytes": profile.host.bytes,
    }
    for values, least, words in ((positive, 0, "above 0"), (counts, -1, "0 or more")):
        for key, value in values.items():
            if not (math.isfinite(value) and value > least and value >= 0):
                raise ValueError(f"{key} is {value}, it should be {words}")
    if profile.max_num_batched_tokens < profile.max_num_seqs:
        raise ValueError(
            f"max_num_batched_tokens is {profile.max_num_batched_tokens}, it should be at least max_num_seqs, "
            f"{profile.max_num_seqs}: each running request computes a token a step"
        )
    longest = profile.memory.request_blocks(profile.max_model_len)
    if profile.kv_blocks < longest:
        raise ValueError(
            f"device_bytes holds {profile.kv_blocks} KV blocks beside a step, and one request of max_model_len needs "
            f"{longest}: raise device_bytes, or lower max_model_len to {profile.kv_tokens}"
        )
    return profile
