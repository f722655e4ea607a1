"""When requests are sent.

In an open loop the times are fixed before the run and never wait for answers: a slow server meets the same load as a
fast one. In a closed loop each of some clients sends its next request when its last one was answered.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.bench.errors import BenchError
from cluster.bench.workload import Request, random_stream


@dataclass(frozen=True)
class OpenLoop:
    """Intervals of a gamma distribution, with the parameters of ``vllm bench serve``.

    Attributes:
        rate: requests a second; infinite: all at once.
        burstiness: shape of the distribution. 1: Poisson; below: burstier; above: more even; infinite: constant.
    """

    rate: float = math.inf
    burstiness: float = 1.0

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise BenchError(f"--request-rate {self.rate:g} does not fit: give requests a second above 0, or inf")
        if not self.burstiness > 0:
            raise BenchError(f"--burstiness {self.burstiness:g} does not fit: give a number above 0, or inf")


@dataclass(frozen=True)
class Replay:
    """The times of the trace.

    Attributes:
        time_scale: 2 replays twice as fast.
    """

    time_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.time_scale < math.inf:
            raise BenchError(
                f"--time-scale {self.time_scale:g} does not fit: give a number above 0; 2 is twice as fast"
            )


@dataclass(frozen=True)
class ClosedLoop:
    """``concurrency`` clients."""

    concurrency: int

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise BenchError(f"--concurrency {self.concurrency} does not fit: give at least 1")


Arrivals = OpenLoop | Replay | ClosedLoop


def due_times(arrivals: OpenLoop | Replay, requests: Sequence[Request], seed: int) -> list[float]:
    """When each request is due, in seconds from the start of the run, ascending.

    As in ``vllm bench serve``, random intervals are stretched so that the last of n requests is due at n / rate: runs
    with different seeds then offer the same load. Raises BenchError where a replay has no times.
    """
    if isinstance(arrivals, Replay):
        times = [request.arrival_s for request in requests]
        if any(time is None for time in times):
            raise BenchError("the requests carry no times to replay: give --trace, --request-rate or --concurrency")
        seconds = np.array(times, dtype=float)
        return [float(due) for due in (seconds - seconds[0]) / arrivals.time_scale]
    count = len(requests)
    if math.isinf(arrivals.rate):
        return [0.0] * count
    if math.isinf(arrivals.burstiness):
        gaps = np.full(count, 1 / arrivals.rate)
    else:
        gaps = random_stream(seed).gamma(arrivals.burstiness, size=count)
    ends = np.cumsum(gaps)
    if ends[-1] == 0:  # a tiny burstiness can round every interval to nothing
        raise BenchError(f"--burstiness {arrivals.burstiness:g} is too small for {count} requests: give a larger one")
    return [float(due) for due in ends * (count / arrivals.rate / ends[-1])]
