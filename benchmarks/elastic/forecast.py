"""What an open loop would meet on an engine of known memory and speed. Pure: the bound of scenarios with arrivals.

First come, first served, as vLLM does: a prompt is admitted when its KV blocks fit, a prompt goes before decodes, and
who needs a block that is not there displaces the request that was admitted last, whose prefill starts over. With a host
buffer nobody starts over, and where there are objectives, requests are set aside for prompts by the engine's policy.
Copies take no time here.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.elastic.bounds import Speed
from cluster.bench.report import RequestRecord
from cluster.bench.workload import Request
from replicas.elastic_prefill import Claim, ElasticPrefill, Line, Objectives
from replicas.step_memory import Memory


@dataclass(frozen=True)
class Server:
    """An engine.

    Attributes:
        blocks: KV blocks for requests; seqs: most of them at once.
        token_s: seconds of a token of a prompt.
        host_blocks: of a host buffer; objectives: by which it lets prompts in early.
    """

    blocks: int
    seqs: int
    token_s: float
    memory: Memory
    speed: Speed
    host_blocks: int = 0
    objectives: Objectives | None = None


@dataclass
class _Place:
    """A request. ``tokens``: of prompt and answer so far; ``kept``: KV of these is in the host buffer."""

    record: RequestRecord
    tokens: int
    made: int = 0
    kept: bool = False

    @property
    def request_id(self) -> str:
        return str(self.record.index)


def forecast(server: Server, requests: Sequence[Request], dues: Sequence[float]) -> list[RequestRecord]:
    """One record a request, ``due_s`` after the start. Raises ValueError for a request that never fits."""
    queues = _Queues(server, requests, dues)
    places = [place.record for place in queues.coming]
    while queues.step():
        pass
    return places


class _Queues:
    """The engine at the start of a step."""

    def __init__(self, server: Server, requests: Sequence[Request], dues: Sequence[float]) -> None:
        self._server = server
        self.coming = deque(_place(request, due) for request, due in zip(requests, dues, strict=True))
        self._waiting: deque[_Place] = deque()
        self._running: list[_Place] = []
        self._aside: list[_Place] = []
        self._now = 0.0
        self._prefill: ElasticPrefill | None = None
        if server.objectives is not None:
            longest = max(self._blocks(place.record.input_tokens + place.record.asked_tokens) for place in self.coming)
            self._prefill = ElasticPrefill(server.objectives, min(longest, server.host_blocks), server.host_blocks)
        for place in self.coming:
            needed = self._blocks(place.record.input_tokens + place.record.asked_tokens)
            if needed > server.blocks:
                raise ValueError(f"a request of {needed} KV blocks never fits {server.blocks}")

    def step(self) -> bool:
        """Compute a prompt, or a token of each running request; False when all have ended."""
        if not (self._waiting or self._running or self._aside):
            if not self.coming:
                return False
            self._now = max(self._now, self.coming[0].record.sent_s)
        while self.coming and self.coming[0].record.sent_s <= self._now:
            place = self.coming.popleft()
            self._waiting.append(place)
            if self._prefill is not None:
                self._prefill.arrive(place.request_id, place.record.sent_s)
        if self._prefill is not None:
            self._make_way(self._prefill)
        if self._admits():
            served = [self._waiting.popleft()]
            self._running += served
            self._now += 0.0 if served[0].kept else served[0].tokens * self._server.token_s
            served = [] if served[0].kept else served
        else:
            while self._free() < 0:
                self._waiting.appendleft(self._running.pop())
                self._waiting[0].kept = self._server.host_blocks > 0
            served = self._running
            context = sum(place.tokens for place in served) / len(served)
            self._now += self._server.speed.decode_step_s(len(served), context)
        for place in served:
            self._produce(place)
        for place in self._running:
            if place.made == place.record.asked_tokens and self._prefill is not None:
                self._prefill.forget(place.request_id)
        self._running = [place for place in self._running if place.made < place.record.asked_tokens]
        return True

    def _make_way(self, prefill: ElasticPrefill) -> None:
        """What ElasticScheduler does with this policy."""
        new = next((place for place in self._waiting if not place.made), None)
        started = {place.request_id: place.made for place in (*self._running, *self._aside) if place.made}
        prefill.observe(self._now, new.request_id if new is not None else None, started)
        if len(self._running) >= self._server.seqs:
            new = None
        running = {place.request_id: place for place in self._running}
        movable = [running[name] for name in prefill.movable(running)] if new is not None else []
        displaced = prefill.decide(
            Line(
                self._free(),
                self._claim(new) if new is not None else None,
                [self._claim(place) for place in self._aside],
                [self._claim(place) for place in movable],
                bool(self._running),
            )
        )
        for place in movable:
            if place.request_id in displaced:
                self._running.remove(place)
                self._aside.append(place)
        still = prefill.aside
        self._running += [place for place in self._aside if place.request_id not in still]
        self._aside = [place for place in self._aside if place.request_id in still]

    def _admits(self) -> bool:
        """Is the first waiting request let in now?"""
        if not self._waiting or len(self._running) >= self._server.seqs:
            return False
        first = self._waiting[0]
        if self._prefill is not None and self._prefill.holds(first.request_id, new=not first.made):
            return False
        return self._blocks(first.tokens + 1) <= self._free()

    def _produce(self, place: _Place) -> None:
        """One more token now."""
        record = place.record
        place.made += 1
        place.tokens += 1
        place.kept = False
        if place.made == 1:
            record.ttft_s = self._now - record.sent_s
        record.output_tokens = place.made
        record.latency_s = self._now - record.sent_s

    def _free(self) -> int:
        """Blocks that are left when each running request has its next token; negative where they need more."""
        return self._server.blocks - sum(self._blocks(place.tokens + 1) for place in self._running)

    def _claim(self, place: _Place) -> Claim:
        return Claim(place.request_id, self._blocks(place.tokens + 1))

    def _blocks(self, tokens: int) -> int:
        return self._server.memory.request_blocks(tokens)


def _place(request: Request, due_s: float) -> _Place:
    record = RequestRecord(
        index=request.index,
        due_s=due_s,
        sent_s=due_s,
        input_tokens=len(request.prompt),
        asked_tokens=request.output_len,
        clipped=request.clipped,
    )
    return _Place(record, tokens=len(request.prompt))
