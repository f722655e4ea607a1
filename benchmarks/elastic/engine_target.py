"""An engine in this process as a target of the load generator: no HTTP between them."""

import itertools
from collections.abc import AsyncIterator

from vllm.sampling_params import RequestOutputKind, SamplingParams

from cluster.bench.target import Chunk, Usage
from cluster.bench.workload import Request
from replicas.local_engine import LocalEngine


class EngineTarget:
    """Greedy answers of exactly the length that was asked for. A dead engine ends the run."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self._numbers = itertools.count()
        self._in_flight = 0

    @property
    def idle(self) -> bool:
        """No request is in flight."""
        return not self._in_flight

    def stream(self, request: Request) -> AsyncIterator[Chunk | Usage]:
        return self._answer([int(token) for token in request.prompt], request.output_len)

    async def _answer(self, prompt: list[int], tokens: int) -> AsyncIterator[Chunk | Usage]:
        params = SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        name = f"load-{next(self._numbers)}"
        self._in_flight += 1
        try:
            async for output in self._engine.llm.generate({"prompt_token_ids": prompt}, params, name):
                yield Chunk(len(output.outputs[0].token_ids))
        finally:
            self._in_flight -= 1
