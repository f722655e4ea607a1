"""The first steps of a new engine whose activations are charged: they measure them before users come."""

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Sequence

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest

from replicas.engine_host import EngineHost
from replicas.hop import HopCodec

_PREFIX = "warm-up-"
_SIZES = (16, 16, 16, 64, 64, 512, 512)
"""Prompts, one step each: the first step of a process and the first one of its kind are not learned (ActivationMeter).
Larger ones are measured as they come."""
_ROWS = 32
"""Requests that decode together."""
_DECODES = 6


def warm_up_id(number: int) -> str:
    """The id of a request of the warm-up."""
    return f"{_PREFIX}{number}"


def ahead_id(name: str) -> str:
    """The id of a request whose KV another one will use."""
    return f"{_PREFIX}{name}"


def is_warm_up(request_id: str) -> bool:
    """Is it a request of the cluster's own, whose answer says nothing about those of users?"""
    return request_id.startswith(_PREFIX)


class _Sink:
    """An outlet whose outputs nobody needs."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def put(self, output: EngineCoreOutput) -> None:
        if output.finished and not self.ended.done():
            self.ended.set_result(None)


async def warm_up(engine: EngineHost) -> None:
    """Compute prompts of several sizes, and then many that decode together, as far as the engine's limits allow it. The
    engine's pump must be running. Raises EngineDeadError where the engine dies."""
    if "generate" not in await engine.supported_tasks():
        return
    model, scheduler = engine.config.model_config, engine.config.scheduler_config
    most = min(model.max_model_len - _DECODES, scheduler.max_num_batched_tokens)
    codec, numbers = HopCodec(), itertools.count()

    async def generate(prompt: Sequence[int], tokens: int) -> None:
        request = EngineCoreRequest(
            request_id=warm_up_id(next(numbers)),
            prompt_token_ids=list(prompt),
            mm_features=None,
            sampling_params=SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        await engine.run(codec.encode_request(request), _Sink())

    await compute(generate, model.get_vocab_size(), most, scheduler.max_num_seqs)


async def compute(
    generate: Callable[[Sequence[int], int], Awaitable[object]], vocabulary: int, most_tokens: int, most_rows: int
) -> None:
    """The prompts of a warm-up. No two begin alike, so none is found in a prefix cache.

    Args:
        generate: takes a prompt and how many tokens to answer.
        most_tokens: of a prompt; most_rows: of requests at once.
    """
    ids = random.Random(0)

    def prompt(size: int) -> list[int]:
        return [ids.randrange(vocabulary) for _ in range(min(size, most_tokens))]

    for size in _SIZES:
        await generate(prompt(size), 1)
    for rows in (1, min(_ROWS, most_rows)):
        await asyncio.gather(*(generate(prompt(_SIZES[0]), _DECODES) for _ in range(rows)))
