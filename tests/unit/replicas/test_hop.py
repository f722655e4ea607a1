"""What crosses between ingress and replica comes out as it went in."""

import os
import pickle
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from memory_agent.errors import SettingsError
from replicas.hop import HopCodec

BOMB = Path()


def test_request_survives_the_hop() -> None:
    """A request keeps its prompt, its sampling parameters and its structured output rules."""
    rules = StructuredOutputsParams(json={"type": "object"})
    params = SamplingParams(temperature=0.3, seed=7, stop=["end"], max_tokens=9, structured_outputs=rules)
    request = EngineCoreRequest(
        request_id="r",
        prompt_token_ids=list(range(500)),
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=1.5,
        lora_request=None,
        cache_salt="salt",
        data_parallel_rank=None,
        priority=3,
    )
    codec = HopCodec()
    crossed = codec.decode_request(codec.encode_request(request))
    assert crossed.prompt_token_ids == request.prompt_token_ids
    assert (crossed.request_id, crossed.cache_salt, crossed.priority) == ("r", "salt", 3)
    assert crossed.sampling_params is not None
    assert (crossed.sampling_params.seed, crossed.sampling_params.stop) == (7, ["end"])
    assert crossed.sampling_params.structured_outputs is not None
    assert crossed.sampling_params.structured_outputs.json == {"type": "object"}


def test_outputs_survive_the_hop() -> None:
    """Outputs keep their order, reasons, and log probabilities, small ones and those that travel as frames of their
    own."""
    wide = 4096
    small = LogprobsLists(np.array([[1, 2]]), np.array([[-0.5, -1.0]], dtype=np.float32), np.array([0]))
    large = LogprobsTensors(
        torch.arange(wide).reshape(1, -1), torch.linspace(-9, 0, wide).reshape(1, -1), torch.tensor([4])
    )
    outputs = [
        EngineCoreOutput("r", [11], new_logprobs=small),
        EngineCoreOutput("r", [12], new_prompt_logprobs_tensors=large),
        EngineCoreOutput("r", [], finish_reason=FinishReason.STOP, stop_reason="end"),
    ]
    codec = HopCodec()
    frames = codec.encode_outputs(outputs)
    assert len(frames) > 1
    assert all(isinstance(frame, bytes) for frame in frames)
    crossed = codec.decode_outputs(frames)
    assert [output.new_token_ids for output in crossed] == [[11], [12], []]
    assert (crossed[2].finish_reason, crossed[2].stop_reason) == (FinishReason.STOP, "end")
    assert crossed[0].new_logprobs is not None
    np.testing.assert_array_equal(crossed[0].new_logprobs.logprobs, small.logprobs)
    assert crossed[1].new_prompt_logprobs_tensors is not None
    assert torch.equal(crossed[1].new_prompt_logprobs_tensors.logprobs, large.logprobs)


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(BOMB),)


@pytest.mark.parametrize("code", [1, 2])
def test_pickles_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """What would run code where it is unpickled is an error, wherever it stands in a message; with the setting that
    makes vLLM take it there is no codec at all."""
    monkeypatch.setattr(f"{__name__}.BOMB", tmp_path / "run")
    bomb = msgspec.msgpack.Ext(code, pickle.dumps(_Bomb()))
    for value in (bomb, [bomb], [["r", [1], bomb]], [["r", bomb]]):
        data = [msgspec.msgpack.encode(value)]
        with pytest.raises((msgspec.MsgspecError, NotImplementedError)):
            HopCodec().decode_outputs(data)
        with pytest.raises((msgspec.MsgspecError, NotImplementedError)):
            HopCodec().decode_request(data)
    pickle.loads(bomb.data)
    assert (tmp_path / "run").is_dir(), "it would have"
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    with pytest.raises(SettingsError, match="unset it"):
        HopCodec()
