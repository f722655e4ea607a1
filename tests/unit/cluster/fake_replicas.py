"""Replicas behind a Ray Serve handle, played in this process: each call of ``generate`` follows a script."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import ActorDiedError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.metrics.stats import SchedulerStats

from replicas.hop import Frames, HopCodec
from replicas.replica import ReplicaInfo, ReplicaStats

INFO = ReplicaInfo(supported_tasks=("generate",), max_model_len=128, kv_blocks=8, block_tokens=16)
Step = int | str | Exception
"""A token id to send, "finish", "end" (the stream ends), "wait" (for ever), "cancel", or an error to raise."""


def request(request_id: str = "r") -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=8),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def died() -> ActorDiedError:
    return ActorDiedError()


def stats(engine_id: str, running: int = 0, waiting: int = 0) -> ReplicaStats:
    return ReplicaStats(engine_id, 1, running, SchedulerStats(num_running_reqs=running, num_waiting_reqs=waiting))


@dataclass
class FakeStream:
    """What ``handle.options(stream=True).generate.remote`` returns."""

    frames: Frames
    script: Sequence[Step]
    cancelled: bool = False
    codec: HopCodec = field(default_factory=HopCodec)

    def cancel(self) -> None:
        self.cancelled = True

    async def __aiter__(self) -> AsyncIterator[Frames]:
        request_id = self.codec.decode_request(self.frames).request_id
        for step in self.script:
            await asyncio.sleep(0)
            if isinstance(step, Exception):
                raise step
            if step == "end":
                return
            if step == "wait":
                await asyncio.Event().wait()
            if step == "cancel":
                raise asyncio.CancelledError
            reason = FinishReason.LENGTH if step == "finish" else None
            tokens = [step] if isinstance(step, int) else []
            yield self.codec.encode_outputs([EngineCoreOutput(request_id, tokens, finish_reason=reason)])


@dataclass
class FakeHandle:
    """Plays ``scripts`` one after the other; ``answers`` is what a broadcast returns, or a function that raises."""

    scripts: list[Sequence[Step]] = field(default_factory=list)
    answers: Callable[[], list[Any]] = lambda: [stats("a")]
    streams: list[FakeStream] = field(default_factory=list)

    def options(self, *, method_name: str, stream: bool) -> "FakeHandle":
        assert (method_name, stream) == ("generate", True)
        return self

    def remote(self, frames: Frames) -> FakeStream:
        self.streams.append(FakeStream(frames, self.scripts[len(self.streams)]))
        return self.streams[-1]

    def broadcast(self, method: str) -> "FakeHandle":
        assert method == "stats"
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert timeout_s > 0
        assert return_exceptions
        return self.answers()
