"""Replicas as the numbered engines of vLLM's metrics: ``vllm:num_requests_running{engine="0"}`` is one replica's."""

from collections.abc import Iterator

from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats

from replicas.replica import ReplicaStats


class EngineSlots:
    """Gives each replica an engine number that it keeps while it lives, and zeroes the number of one that is gone.

    There are as many numbers as replicas are meant to run; one that comes early, while its predecessor still
    answers, waits for its number.
    """

    def __init__(self, count: int) -> None:
        self._owners: list[str | None] = [None] * count

    @property
    def owners(self) -> dict[int, str]:
        """The replica of each number that has one."""
        return {number: owner for number, owner in enumerate(self._owners) if owner is not None}

    def place(self, stats: list[ReplicaStats]) -> Iterator[EngineCoreOutputs]:
        """Scheduler statistics for each number that has a replica in ``stats``, and zeros for each that has just
        lost its own."""
        waiting = {replica.engine_id: replica for replica in stats}
        for number, owner in enumerate(self._owners):
            if owner is None:
                continue
            if owner in waiting:
                yield _numbers(number, waiting.pop(owner).scheduler)
            else:
                self._owners[number] = None
                yield _numbers(number, SchedulerStats())
        for number, owner in enumerate(self._owners):
            if owner is None and waiting:
                engine_id = min(waiting)
                self._owners[number] = engine_id
                yield _numbers(number, waiting.pop(engine_id).scheduler)


def _numbers(number: int, scheduler: SchedulerStats) -> EngineCoreOutputs:
    return EngineCoreOutputs(engine_index=number, scheduler_stats=scheduler)
