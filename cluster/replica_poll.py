"""Asks every replica of a model for its numbers, again and again."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from replicas.replica import ReplicaStats

POLL_PERIOD_S = 1.0
POLL_TIMEOUT_S = 3.0
STALE_AFTER_S = 15.0


async def follow_stats(
    handle: DeploymentHandle[Any],
    ingress: str,
    queued: Callable[[], int],
    take: Callable[[list[ReplicaStats]], None],
) -> None:
    """Ask once a second, for ever, as the ingress of that name, in which so many requests wait now; ``take`` gets the
    numbers of those that answer."""
    answered_s = time.monotonic()
    while True:
        started_s = time.monotonic()
        try:
            answers = await handle.broadcast("stats", ingress, queued()).results_async(
                timeout_s=POLL_TIMEOUT_S, return_exceptions=True
            )
            answered_s = started_s
        except RayServeException:  # there is no replica at all
            answers, answered_s = [], started_s
        except TimeoutError:
            answers = None  # one of them is stuck, which says nothing of the others: keep the last count a while
        if answers is not None:
            take([answer for answer in answers if isinstance(answer, ReplicaStats)])
        elif started_s - answered_s > STALE_AFTER_S:
            take([])
        await asyncio.sleep(max(0.0, started_s + POLL_PERIOD_S - time.monotonic()))
