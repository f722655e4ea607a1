"""What crosses the hop between ingress and replica: token ids and their company, never text.

    ingress -> replica    one EngineCoreRequest a request
    replica -> ingress    lists of EngineCoreOutput, everything that was ready since the last list

Both travel in vLLM's own msgpack form as a list of frames, so that whatever a release of vLLM puts into a request
or an output crosses without being named here. Both sides must run the same release of vLLM. No pickle is taken from
the other side: vLLM's decoder would do that only where VLLM_ALLOW_INSECURE_SERIALIZATION is set, which is refused here.
"""

from collections.abc import Sequence
from typing import Any

from vllm import envs
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from memory_agent.errors import SettingsError

Frames = list[bytes]
TTFT_TARGET_ARG, TPOT_TARGET_ARG = "slo_ttft_ms", "slo_tpot_ms"
"""In ``SamplingParams.extra_args`` of a request: its own objectives for the first token and for the time per token
after it, in milliseconds. Without them it has those of the first class."""


class HopCodec:
    """Encodes and decodes both directions. Not thread-safe: one a process and event loop."""

    def __init__(self) -> None:
        """Raises SettingsError where the environment makes vLLM unpickle what comes."""
        if envs.VLLM_ALLOW_INSECURE_SERIALIZATION:
            raise SettingsError("VLLM_ALLOW_INSECURE_SERIALIZATION lets whoever sends outputs run code here: unset it")
        self._encoder = MsgpackEncoder()
        self._request_decoder = MsgpackDecoder(EngineCoreRequest)
        self._outputs_decoder = MsgpackDecoder(list[EngineCoreOutput])

    def encode_request(self, request: EngineCoreRequest) -> Frames:
        return self._encode(request)

    def decode_request(self, frames: Sequence[bytes]) -> EngineCoreRequest:
        """Raises msgspec.DecodeError for frames of another release of vLLM."""
        request: EngineCoreRequest = self._request_decoder.decode(frames)
        return request

    def encode_outputs(self, outputs: list[EngineCoreOutput]) -> Frames:
        return self._encode(outputs)

    def decode_outputs(self, frames: Sequence[bytes]) -> list[EngineCoreOutput]:
        """Raises msgspec.DecodeError for frames of another release of vLLM."""
        outputs: list[EngineCoreOutput] = self._outputs_decoder.decode(frames)
        return outputs

    def _encode(self, value: object) -> Frames:
        # The encoder hands out views of live tensors beside the first frame; the transport pickles, so own the bytes.
        frames: Sequence[Any] = self._encoder.encode(value)
        return [bytes(frame) for frame in frames]
