"""The one place that touches vLLM's scheduler below its public surface, with a check that it looks as expected.

vLLM has no public way to see the next free blocks without listing all of them, to preempt a running request when
memory has to go back to a neighbour, or to learn of a preemption while the request has its blocks. ``preempt`` does
what ``Scheduler.reset_prefix_cache(reset_running_requests=True)`` does, for one request.
"""

import inspect
import time
from collections.abc import Iterator

import vllm
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

SUPPORTED_VLLM = "0.32"


class IncompatibleVllm(RuntimeError):
    """The installed vLLM is not the one this adapter was written for. Install the version it names."""


def check_scheduler(scheduler: Scheduler) -> None:
    """Raise IncompatibleVllm unless every private name used here is there, with the expected form."""
    if not vllm.__version__.startswith(SUPPORTED_VLLM + "."):
        raise IncompatibleVllm(f"vLLM {vllm.__version__} is installed; elastic KV memory needs vllm {SUPPORTED_VLLM}.*")
    parameters = list(inspect.signature(Scheduler._preempt_request).parameters)
    if parameters != ["self", "request", "timestamp", "drop_stale_output"]:
        raise IncompatibleVllm(f"Scheduler._preempt_request has parameters {parameters}")
    for name in (
        "running",
        "waiting",
        "deferred_frees",
        "prev_step_scheduled_req_ids",
        "max_num_active_reqs",
        "max_num_scheduled_tokens",
    ):
        if not hasattr(scheduler, name):
            raise IncompatibleVllm(f"Scheduler has no attribute {name!r}")
    if not hasattr(scheduler.kv_cache_manager, "watermark_blocks"):
        raise IncompatibleVllm("KVCacheManager has no attribute 'watermark_blocks'")
    queue = scheduler.kv_cache_manager.block_pool.free_block_queue
    for name in ("fake_free_list_head", "fake_free_list_tail"):
        if not hasattr(getattr(queue, name, None), "next_free_block"):
            raise IncompatibleVllm(f"FreeKVCacheBlockQueue has no linked {name!r}")


class PreemptionNotice(Scheduler):
    """vLLM's scheduler, and notice of every preemption: by ``preempt``, and by vLLM itself where memory is short."""

    def about_to_preempt(self, request: Request) -> None:
        """The running ``request`` is about to lose its blocks, and what it has computed is worth keeping."""
        raise NotImplementedError

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        # Output in flight is dropped where KV is not to be used again: by a reset, and by ``restart``.
        if not drop_stale_output:
            self.about_to_preempt(request)
        super()._preempt_request(request, timestamp, drop_stale_output)


def free_blocks(pool: BlockPool) -> Iterator[KVCacheBlock]:
    """vLLM's free blocks in the order in which they are allocated."""
    queue = pool.free_block_queue
    block = queue.fake_free_list_head.next_free_block
    while block is not None and block is not queue.fake_free_list_tail:
        yield block
        block = block.next_free_block


def preempt_last(scheduler: Scheduler) -> int:
    """Preempt the running request that was admitted last; it waits at the head of the queue and loses no token.

    Returns:
        Blocks that become free only when the steps in flight have finished; -1 when nothing is running.
    """
    if not scheduler.running:
        return -1
    before = returning_blocks(scheduler)
    preempt(scheduler, scheduler.running[-1])
    return returning_blocks(scheduler) - before


def preempt(scheduler: Scheduler, request: Request) -> None:
    """Preempt a running request; it waits at the head of the queue and loses no token."""
    scheduler.running.remove(request)
    scheduler._preempt_request(request, time.monotonic())
    # It may be scheduled again at once: the model runner must then see it as resumed, not as continued.
    scheduler.prev_step_scheduled_req_ids.discard(request.request_id)


def restart(scheduler: Scheduler, request: Request) -> None:
    """Preempt a running request, and drop its output in flight; of one that has been preempted drop it too."""
    if request.status == RequestStatus.RUNNING:
        scheduler.running.remove(request)
        scheduler._preempt_request(request, time.monotonic(), drop_stale_output=True)
        scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
    request.drop_stale_output = True


def returning_blocks(scheduler: Scheduler) -> int:
    """Blocks whose release waits for steps in flight (async scheduling, pipeline parallelism)."""
    return sum(len(blocks) for _, blocks in scheduler.deferred_frees)
