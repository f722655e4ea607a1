"""vLLM's schedulers with a lease: each step they ask what fits. Chosen by ``scheduler_cls``."""

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from memory_agent.lease_board import EngineWord, ReplicaWord
from replicas.elastic_connector import ElasticKVConnector
from replicas.elastic_kv import ElasticKv
from replicas.elastic_prefill import Claim, ElasticPrefill, Line, Objectives
from replicas.kv_geometry import check_guarantee
from replicas.kv_plan import blocks_ahead
from replicas.measured_scheduler import MeasuredScheduler
from replicas.migration_words import push_order
from replicas.prompt_share import fair_share, most_tokens
from replicas.step_demand import StepDemand
from replicas.vllm_adapter import PreemptionNotice, check_scheduler, preempt, preempt_last, restart, returning_blocks
from replicas.warm_up import is_warm_up

_MOST_RESERVE_BLOCKS = 16
"""Bound on the blocks kept mapped beyond what the queues ask for."""


class _Elastic(MeasuredScheduler, PreemptionNotice):
    """What both schedulers add. Only the bounds of a step change; which request runs is decided by vLLM."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_scheduler(self)
        if not isinstance(self.connector, ElasticKVConnector):
            raise TypeError(f"{type(self).__name__} needs ElasticKVConnector, found {type(self.connector).__name__}")
        self._elastic_connector = self.connector
        self._kv_groups = self.connector.groups
        check_guarantee(
            self._kv_groups,
            self.connector.geometry,
            self.vllm_config.parallel_config.world_size,
            self.connector.settings.kv_guarantee_bytes,
        )
        self._own_token_budget = self._token_bound = self._step_bound = self.max_num_scheduled_tokens
        self._own_active = self.max_num_active_reqs
        self._own_prompt_share = self.scheduler_config.long_prefill_token_threshold
        settings = self.connector.settings
        self.objectives = Objectives(settings.ttft_slo_s or math.inf, settings.tpot_slo_s or math.inf)
        self._preemptions = 0
        self._target_revision = 0

    def add_request(self, request: Request) -> None:
        migration = self._elastic_connector.migration
        if migration is not None and (order := push_order(request.sampling_params)) is not None:
            migration.order(request, order)
            return
        super().add_request(request)
        if self._elastic_connector.prefill is not None and not is_warm_up(request.request_id):
            self._elastic_connector.prefill.arrive(request.request_id, self.now_s())

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        kv = self._kv
        self._apply_target(kv)
        self._step_bound = self._most_tokens()
        if (migration := self._elastic_connector.migration) is not None:
            migration.before_step(self.requests, self._block_ids)
        ahead = self._running_blocks_ahead()
        prefill = self._elastic_connector.prefill
        if prefill is not None and self._make_way(prefill, ahead):
            ahead = self._running_blocks_ahead()
        demand = self._demand(ahead)
        kv.begin_step(demand, self._preempt)
        if self._elastic_connector.host is not None:
            self._elastic_connector.host.tier.watch(demand.blocks_wanted)
        self.max_num_scheduled_tokens = min(kv.token_budget, self._step_bound)
        self.scheduler_config.long_prefill_token_threshold = self._most_of_a_prompt(demand)
        # A request that is admitted now must not take the blocks that running ones need in the next steps: one that
        # finds none holds up all that are scheduled after it.
        self.kv_cache_manager.watermark_blocks = ahead
        output = super().schedule(throttle_prefills)
        self._preemptions += len(output.preempted_req_ids or ())
        self.pace.publish(kv.row, sum(request.num_computed_tokens for request in self.running), self.now_s())
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        output = model_runner_output.kv_connector_output
        if output is not None and output.invalid_block_ids:
            self._restart(output.invalid_block_ids)
            output.invalid_block_ids = set()
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if (migration := self._elastic_connector.migration) is not None:
            migration.after_step(outputs, self.requests, self._block_ids, self._let_go)
        return outputs

    def get_kv_cache_usage(self) -> float:
        """Used share of what the lease makes reachable; vLLM would count parked blocks as used."""
        return self._kv.usage

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            stats.kv_cache_usage = self._kv.usage
        return stats

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        with self._kv.parking.all_in_pool():
            return super().reset_prefix_cache(reset_running_requests, reset_connector)

    @property
    def _kv(self) -> ElasticKv:
        return self._elastic_connector.kv

    @property
    def _least_tokens(self) -> int:
        """What the lease always has activations for: a token of each request that can run."""
        return min(self.max_num_running_reqs, self._own_token_budget)

    def _most_tokens(self) -> int:
        """Of the coming step."""
        kv_tokens = sum(request.num_computed_tokens for request in self.running)
        step_time = self.pace.step_time
        return most_tokens(self._token_bound, self._own_token_budget, step_time, len(self.running), kv_tokens)

    def _most_of_a_prompt(self, demand: StepDemand) -> int:
        """Tokens of the step that one prompt may take: its fair share where a target makes steps short. 0 for any."""
        if self._token_bound >= self._own_token_budget:
            return self._own_prompt_share
        needs = [need for r in self.running if (need := r.num_tokens - r.num_computed_tokens) > 1]
        if self._kv.free_blocks >= demand.blocks_first:
            places = max(0, self.max_num_active_reqs - len(self.running))
            needs += [request.num_tokens for request in islice(self.waiting, places)]
        return fair_share(needs, self.max_num_scheduled_tokens - len(self.running))

    def _running_blocks_ahead(self) -> int:
        """Blocks that the running requests need to finish their prefill, or soon for their next tokens."""
        lookahead = self._elastic_connector.settings.lookahead_tokens
        return sum(
            blocks_ahead(self._kv_groups, request.num_tokens, request.num_computed_tokens, lookahead)
            for request in self.running
        )

    def _demand(self, running_ahead: int) -> StepDemand:
        """Blocks that would let every running request go on, and every waiting one that may become active start."""
        lookahead = self._elastic_connector.settings.lookahead_tokens
        # One more request like the largest running one can start without waiting a step for its memory.
        prompts = [blocks_ahead(self._kv_groups, request.num_prompt_tokens, 0, lookahead) for request in self.running]
        wanted = running_ahead + min(max(prompts, default=1), _MOST_RESERVE_BLOCKS)
        tokens = tokens_running = sum(max(1, r.num_tokens - r.num_computed_tokens) for r in self.running)
        rows = len(self.running)
        first = None
        for request in islice(self.waiting, max(0, self.max_num_active_reqs - rows)):
            blocks = blocks_ahead(self._kv_groups, request.num_tokens, 0, lookahead)
            first = blocks if first is None else first
            wanted += blocks
            tokens += request.num_tokens
            rows += 1
        running, waiting = self.get_request_counts()
        return StepDemand(
            running=running,
            waiting=waiting,
            blocks_wanted=wanted,
            blocks_first=running_ahead + (first or 0),
            tokens_wanted=min(tokens, self._step_bound),
            tokens_running=min(tokens_running, self._step_bound),
            tokens_least=self._least_tokens,
            rows=rows,
            blocks_returning=returning_blocks(self),
            preemptions=self._preemptions,
        )

    def _make_way(self, prefill: ElasticPrefill, running_ahead: int) -> int:
        """Set running requests aside for a prompt that does not fit, where the objectives want that. Returns how
        many."""
        newcomer = next((request for request in self.waiting if not request.num_output_tokens), None)
        aside = [self.requests[request_id] for request_id in prefill.aside]
        answers = [r for r in (*self.running, *aside) if r.num_output_tokens and not is_warm_up(r.request_id)]
        started = {r.request_id: r.num_output_tokens for r in answers}
        prefill.observe(self.now_s(), newcomer.request_id if newcomer is not None else None, started)
        if len(self.running) >= self.max_num_active_reqs or self.pause_state is not PauseState.UNPAUSED:
            newcomer = None  # it does not wait for memory
        running = {r.request_id: r for r in answers if r.status is RequestStatus.RUNNING} if newcomer else {}
        line = Line(
            free_blocks=self._kv.free_blocks - running_ahead,
            newcomer=self._claim(newcomer) if newcomer is not None else None,
            aside=[self._claim(request) for request in aside],
            movable=[
                Claim(one, -(-running[one].num_computed_tokens // self._kv_groups[0].block_tokens))
                for one in prefill.movable(running)
            ],
            running=bool(self.running),
        )
        displaced = prefill.decide(line)
        for request_id in displaced:
            preempt(self, self.requests[request_id])
        self._kv.row.set(EngineWord.HOST_LOGICAL_BYTES, prefill.logical_blocks * self._kv.block_bytes)
        self._kv.row.set(EngineWord.SET_ASIDE, prefill.displaced)
        return len(displaced)

    def _claim(self, request: Request) -> Claim:
        """What a waiting request needs to start or to go on."""
        lookahead = self._elastic_connector.settings.lookahead_tokens
        return Claim(request.request_id, blocks_ahead(self._kv_groups, request.num_tokens, 0, lookahead))

    def _preempt(self) -> int:
        return preempt_last(self)

    def about_to_preempt(self, request: Request) -> None:
        self._elastic_connector.preempt(request)

    def _restart(self, invalid_block_ids: set[int]) -> None:
        """Requests that have computed with blocks that could not be loaded start again without what they computed
        since. (Left to vLLM they compute these blocks again and go on: then the token of a step that was in flight
        meanwhile counts, and others may find the blocks before they are computed.)"""
        tables = {request.request_id: self._block_ids(request.request_id) for request in reversed(self.running)}
        for request_id in self._elastic_connector.fail(invalid_block_ids, tables):
            restart(self, self.requests[request_id])

    def _block_ids(self, request_id: str) -> Sequence[int]:
        ids: list[int] = self.kv_cache_manager.get_block_ids(request_id)[0]
        return ids

    def _let_go(self, request_id: str) -> None:
        self.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def _apply_target(self, kv: ElasticKv) -> None:
        """The controller's bounds for this replica, as the replica process last wrote them on the board."""
        revision = kv.row.get(ReplicaWord.TARGET_REVISION)
        if revision == self._target_revision:
            return
        tokens, active = kv.row.get(ReplicaWord.TOKEN_BUDGET_MAX), kv.row.get(ReplicaWord.ACTIVE_MAX)
        self._token_bound = min(tokens, self._own_token_budget) if tokens else self._own_token_budget
        self.max_num_active_reqs = min(active, self._own_active) if active else self._own_active
        self._target_revision = revision
        kv.row.set(EngineWord.TARGET_REVISION_APPLIED, revision)


class ElasticScheduler(_Elastic):
    """For synchronous scheduling (vLLM's default on CPU)."""


class ElasticAsyncScheduler(_Elastic, AsyncScheduler):
    """For asynchronous scheduling (vLLM's default on GPU)."""
