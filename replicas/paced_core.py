"""An engine core without an engine: made-up tokens at a given pace, for tests and benchmarks of everything around it.

Takes the place of vLLM's engine core client in ``EngineHost``. As an engine does, it works in steps: each gives one
token to every running request. The answer to a prompt is always the same, whatever else runs.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.metrics.stats import PrefillStats, SchedulerStats

_QUEUED, _SCHEDULED = EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED
_STRIDE = 7919
"""A prime: consecutive tokens of an answer lie far apart in the vocabulary."""


@dataclass
class _Running:
    """A request and how many of its tokens are made."""

    request_id: str
    start: int
    length: int
    prompt_tokens: int
    events: list[EngineCoreEvent] = field(default_factory=lambda: [EngineCoreEvent.new_event(_QUEUED)])
    made: int = 0


class PacedCore:
    """Belongs to the event loop it is built on.

    Steps lie on multiples of the pace's period on the monotonic clock, so that whoever reads that clock too knows
    when each token was due. A step that is late is made up for: the tokens of a request are never fewer than its time
    allows.
    """

    def __init__(self, vocabulary: Sequence[int], tokens_per_s: float, most_running: int, max_model_len: int) -> None:
        """
        Args:
            vocabulary: token ids that answers are made of.
            tokens_per_s: of each request; 0 makes a step whenever the last one's outputs have been taken.
            most_running: requests that run at once; others wait.
            max_model_len: longest prompt and answer.
        """
        self.resources = SimpleNamespace(engine_dead=False)
        self._vocabulary = vocabulary
        self._period_s = 1 / tokens_per_s if tokens_per_s else 0.0
        self._most_running = most_running
        self._max_model_len = max_model_len
        self._running: dict[str, _Running] = {}
        self._waiting: deque[_Running] = deque()
        self._wake = asyncio.Event()
        self._next_step = 0
        self._idle = True

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        params, prompt = request.sampling_params, request.prompt_token_ids or []
        assert isinstance(params, SamplingParams)
        room = self._max_model_len - len(prompt)
        length = room if params.max_tokens is None else min(params.max_tokens, room)
        start = sum(prompt) + len(prompt)
        self._waiting.append(_Running(request.request_id, start, max(1, length), len(prompt)))
        self._wake.set()

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        gone = set(request_ids)
        for request_id in request_ids:
            self._running.pop(request_id, None)
        self._waiting = deque(request for request in self._waiting if request.request_id not in gone)

    async def get_output_async(self) -> EngineCoreOutputs:
        """The next step's outputs, when it is due."""
        await self._until_due()
        self._admit()
        outputs = [self._token_of(request) for request in list(self._running.values())]
        stats = SchedulerStats(num_running_reqs=len(self._running), num_waiting_reqs=len(self._waiting))
        return EngineCoreOutputs(outputs=outputs, scheduler_stats=stats)

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)

    async def call_utility_async(self, method: str, *args: object) -> None:
        """Nothing to do: there is no engine to wake."""

    def shutdown(self, timeout: float | None = None) -> None:
        self.resources.engine_dead = True

    async def _until_due(self) -> None:
        """Wait for a request, then for the step's time. Without a pace, only let others have their turn."""
        if not self._running and not self._waiting:
            self._idle = True
            while not self._waiting:
                self._wake.clear()
                await self._wake.wait()
        if not self._period_s:
            await asyncio.sleep(0)
            return
        now_s = time.monotonic()
        if self._idle:
            self._idle = False
            self._next_step = int(now_s / self._period_s) + 1
        await asyncio.sleep(max(0.0, self._next_step * self._period_s - now_s))
        self._next_step += 1

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._most_running:
            request = self._waiting.popleft()
            request.events.append(EngineCoreEvent.new_event(_SCHEDULED))
            self._running[request.request_id] = request

    def _token_of(self, request: _Running) -> EngineCoreOutput:
        token = self._vocabulary[(request.start + _STRIDE * request.made) % len(self._vocabulary)]
        request.made += 1
        output = EngineCoreOutput(request.request_id, [token])
        if request.made == 1:
            output.events = request.events
            output.prefill_stats = PrefillStats()
            output.prefill_stats.set(request.prompt_tokens, 0, 0)
        if request.made == request.length:
            output.finish_reason = FinishReason.LENGTH
            del self._running[request.request_id]
        return output
