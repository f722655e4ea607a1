"""An engine of ray.serve.llm that costs nothing: ready events, a token each, as fast as they are taken."""

from collections.abc import AsyncIterator
from typing import Any

from ray.llm._internal.serve.core.engine.protocol import LLMEngine
from ray.serve.llm.deployment import LLMServer

from benchmarks.serving_path.events import stream_events


class FreeEngine(LLMEngine):
    """Streamed completions of token ids, and nothing else."""

    def __init__(self, llm_config: Any) -> None:
        self.llm_config = llm_config

    async def start(self) -> None:
        pass

    async def check_health(self) -> None:
        pass

    def routing_stats(self) -> dict[str, Any]:
        return {}

    async def completions(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[str]:
        async for event in stream_events(len(request.prompt), request.max_tokens):
            yield event

    async def resolve_lora(self, lora_model: Any) -> None:
        raise NotImplementedError

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[str]:
        raise NotImplementedError
        yield

    async def embeddings(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[str]:
        raise NotImplementedError
        yield

    async def transcriptions(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[str]:
        raise NotImplementedError
        yield

    async def reset_prefix_cache(self) -> None:
        pass


class FreeServer(LLMServer):
    """Deployed in place of the server around vLLM."""

    _default_engine_cls = FreeEngine
