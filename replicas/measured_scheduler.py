"""vLLM's scheduler, measuring its own steps: what each computed and how long it took, and the pace of its answers."""

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from replicas.elastic_prefill import Objectives
from replicas.engine_pace import EnginePace
from replicas.hop import TPOT_TARGET_ARG, TTFT_TARGET_ARG
from replicas.step_time import StepWork, prompt_pairs
from replicas.warm_up import is_warm_up


class MeasuredScheduler(Scheduler):
    """Attributes:
    pace: of this engine, as measured so far.
    objectives: of requests that bring none of their own.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pace = EnginePace()
        self.objectives = Objectives(math.inf, math.inf)

    def now_s(self) -> float:
        """The clock of the objectives, monotonic seconds."""
        return time.monotonic()

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        if not is_warm_up(request.request_id):
            objectives = own_objectives(request, self.objectives)
            self.pace.arrive(request.request_id, request.num_prompt_tokens, objectives, self.now_s())

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        began_s = self.now_s()
        output = super().schedule(throttle_prefills)
        self.pace.begin(began_s, step_work(output, self.requests))
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        now_s = self.now_s()
        self.pace.end(now_s)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for of_client in outputs.values():
            for one in of_client.outputs:
                if one.new_token_ids:
                    self.pace.answer(one.request_id, len(one.new_token_ids), now_s)
                if one.finished:
                    self.pace.forget(one.request_id)
        self.pace.rest(busy=self.has_unfinished_requests())
        return outputs

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        finished: list[Request] = super().finish_requests(request_ids, finished_status)
        for request in finished:
            self.pace.forget(request.request_id)
        return finished


def step_work(output: SchedulerOutput, requests: Mapping[str, Request]) -> StepWork:
    """What the step computes that was scheduled just now."""
    rows, kv_tokens, tokens, pairs = 0, 0, 0, 0.0
    for request_id, count in output.num_scheduled_tokens.items():
        request = requests[request_id]
        before = request.num_computed_tokens - count  # vLLM has counted the step's tokens already
        if count == 1 and before >= request.num_prompt_tokens:
            rows += 1
            kv_tokens += before
        else:
            tokens += count
            pairs += prompt_pairs(before, count)
    return StepWork(rows, kv_tokens, tokens, pairs)


def own_objectives(request: Request, default: Objectives) -> Objectives:
    """The request's objectives; the default ones in place of those that it has not, or that are no time."""
    params = request.sampling_params
    args = (params.extra_args if params is not None else None) or {}
    return Objectives(
        _seconds(args.get(TTFT_TARGET_ARG), default.ttft_s), _seconds(args.get(TPOT_TARGET_ARG), default.tpot_s)
    )


def _seconds(target_ms: Any, default_s: float) -> float:
    """Of what may have come from a client."""
    if not isinstance(target_ms, int | float) or not 0 < target_ms < math.inf:
        return default_s
    return target_ms / 1000
