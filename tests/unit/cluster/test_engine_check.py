"""vLLM is asked before anything is started."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ClusterConfig
from cluster.engine_check import check_engine
from cluster.models import read_facts
from cluster.sizing import GIB, plan_sizes
from memory_agent.errors import SettingsError

Checkpoint = Callable[..., Path]


def check(folder: Path, elastic: bool = True, **engine_args: Any) -> None:
    config = ClusterConfig.model_validate({"models": [{"name": "m", "elastic": elastic, "engine_args": engine_args}]})
    (spec,) = plan_sizes(config, [read_facts(folder, config.models[0])], 64 * GIB).specs
    check_engine(spec)


def test_settings_that_vllm_takes_pass(checkpoint: Checkpoint) -> None:
    """A plain checkpoint with arguments of vLLM's own is accepted, and this process's environment stays as it is."""
    before = dict(os.environ)
    check(checkpoint(), block_size=64, seed=3)
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("engine_args", "said"),
    [
        ({"blok_size": 64}, "no engine argument 'blok_size'; did you mean block_size"),
        ({"seed": "x"}, "seed: Input should be a valid integer"),
        ({"attention_backend": "NOPE"}, "Unknown attention backend: 'NOPE'"),
    ],
)
def test_settings_that_vllm_refuses_are_refused(
    checkpoint: Checkpoint, engine_args: dict[str, object], said: str
) -> None:
    """An unknown argument, a wrong type, a wrong value: the model and vLLM's own words."""
    with pytest.raises(SettingsError, match=r"^model m: ") as caught:
        check(checkpoint(), **engine_args)
    assert said in str(caught.value)


def test_an_architecture_that_vllm_lacks_is_refused(checkpoint: Checkpoint) -> None:
    """A model of a kind that vLLM cannot run is refused by its architecture's name."""
    with pytest.raises(SettingsError, match=r"refuses .*NoSuchForCausalLM"):
        check(checkpoint(architectures=["NoSuchForCausalLM"]))


def test_a_model_with_recurrent_layers_is_static_only(checkpoint: Checkpoint) -> None:
    """It is refused as an elastic one, with the setting that works, and accepted as a static one."""
    folder = checkpoint(
        architectures=["Lfm2ForCausalLM"],
        model_type="lfm2",
        layer_types=["conv", "full_attention", "conv", "full_attention"],
        conv_L_cache=3,
        conv_dim=256,
        block_dim=256,
        vocab_size=1024,
        intermediate_size=512,
    )
    with pytest.raises(SettingsError, match=r"^model m: Lfm2ForCausalLM .*recurrent state.*elastic: false"):
        check(folder)
    check(folder, elastic=False)


def test_a_model_with_sliding_windows_can_be_elastic(checkpoint: Checkpoint) -> None:
    """Attention of several kinds has KV blocks only."""
    check(
        checkpoint(
            architectures=["Gemma3ForCausalLM"],
            model_type="gemma3_text",
            layer_types=["sliding_attention", "full_attention"] * 2,
            sliding_window=128,
            head_dim=32,
        )
    )
