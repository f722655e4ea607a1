"""The first steps of a new engine whose activations are charged: they measure them before users come."""

import random
import time
from collections.abc import Sequence

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from replicas.engine_host import EngineHost
from replicas.hop import HopCodec

WARM_UP_TOKENS = (16, 64, 512)
"""Prompts of the warm-up, one step each: the first step of a process is not learned (see ActivationMeter), the line
goes through the other two. Larger steps are measured as they come."""


async def warm_up(engine: EngineHost, sizes: Sequence[int] = WARM_UP_TOKENS) -> None:
    """Compute one prompt of each size, as far as the engine's limits allow it, and a token. The engine's pump must be
    running. Raises EngineDeadError where the engine dies."""
    if "generate" not in await engine.supported_tasks():
        return
    model = engine.config.model_config
    most = min(model.max_model_len - 1, engine.config.scheduler_config.max_num_batched_tokens)
    ids = random.Random(0)
    codec = HopCodec()
    for size in sorted({min(size, most) for size in sizes}):
        request = EngineCoreRequest(
            request_id=f"warm-up-{size}",
            prompt_token_ids=[ids.randrange(model.get_vocab_size()) for _ in range(size)],
            mm_features=None,
            sampling_params=SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        async for _ in engine.generate(codec.encode_request(request)):
            pass
