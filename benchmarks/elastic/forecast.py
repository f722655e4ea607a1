"""What an open loop would meet on an engine of known memory and speed. Pure: the bound of scenarios with arrivals.

First come, first served, as vLLM does: a prompt is admitted when its KV blocks fit, a prompt goes before decodes, and
who needs a block that is not there displaces the request that was admitted last, whose prefill starts over.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.elastic.bounds import Memory, Speed
from cluster.bench.report import RequestRecord
from cluster.bench.workload import Request


@dataclass(frozen=True)
class Server:
    """An engine.

    Attributes:
        blocks: KV blocks for requests; seqs: most of them at once.
        token_s: seconds of a token of a prompt.
    """

    blocks: int
    seqs: int
    token_s: float
    memory: Memory
    speed: Speed


@dataclass
class _Place:
    record: RequestRecord
    tokens: int
    made: int = 0


def forecast(server: Server, requests: Sequence[Request], dues: Sequence[float]) -> list[RequestRecord]:
    """One record a request, ``due_s`` after the start. Raises ValueError for a request that never fits."""
    coming = deque(
        _Place(
            RequestRecord(
                index=request.index,
                due_s=due,
                sent_s=due,
                input_tokens=len(request.prompt),
                asked_tokens=request.output_len,
                clipped=request.clipped,
            ),
            tokens=len(request.prompt),
        )
        for request, due in zip(requests, dues, strict=True)
    )
    for place in coming:
        needed = server.memory.request_blocks(place.record.input_tokens + place.record.asked_tokens)
        if needed > server.blocks:
            raise ValueError(f"a request of {needed} KV blocks never fits {server.blocks}")
    places = [place.record for place in coming]
    waiting: deque[_Place] = deque()
    running: list[_Place] = []
    now = 0.0
    while coming or waiting or running:
        if not waiting and not running:
            now = max(now, coming[0].record.sent_s)
        while coming and coming[0].record.sent_s <= now:
            waiting.append(coming.popleft())
        if waiting and len(running) < server.seqs and _blocks(server, [*running, waiting[0]]) <= server.blocks:
            served = [waiting.popleft()]
            running += served
            now += served[0].tokens * server.token_s
        else:
            while _blocks(server, running) > server.blocks:
                waiting.appendleft(running.pop())
            served = running
            context = sum(place.tokens for place in running) / len(running)
            now += server.speed.decode_step_s(len(running), context)
        for place in served:
            _produce(place, now)
        running = [place for place in running if place.made < place.record.asked_tokens]
    return places


def _produce(place: _Place, now: float) -> None:
    """One more token at ``now``."""
    record = place.record
    place.made += 1
    place.tokens += 1
    if place.made == 1:
        record.ttft_s = now - record.sent_s
    record.output_tokens = place.made
    record.latency_s = now - record.sent_s


def _blocks(server: Server, places: Sequence[_Place]) -> int:
    """KV blocks of the requests after their next token."""
    return sum(server.memory.request_blocks(place.tokens + 1) for place in places)
