"""What one vLLM engine with our memory would do: a model of its scheduler, its KV blocks and the time of its steps.
Pure.

The same model serves the simulator and tests of what is around an engine. Its rules are vLLM's: running requests go
first, then prompts, first come, first served, in chunks of what the token budget leaves; a prompt is admitted when all
of it fits; who needs a block that is not there displaces the request that was admitted last, which computes its tokens
again or loads them from the host buffer. Elastic memory gives the KV blocks what the activations of the present step
leave; static memory sets the largest step's aside.

    submit(request)           advance()                  advance()
          |   run of steps        |     run of steps         |
    ------+-----------------------+--------------------------+----->  time
                       next_event_s                 next_event_s

A step with prompts is a run of its own. Steps that only decode are one run until a request is done, blocks run out, or
a request comes, which ends the run after the step under way.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from replicas.decode_batch import DecodeBatch, EngineRequest
from replicas.engine_profile import EngineProfile
from replicas.prefix_cache import PrefixCache
from replicas.prompt_share import beside_decodes, fair_share, most_tokens
from replicas.step_time import StepWork, prompt_pairs
from replicas.targets import ReplicaTarget


@dataclass(frozen=True, slots=True)
class EngineCounts:
    """An engine at one moment, as its reports tell it.

    Attributes:
        used_blocks: KV blocks that requests refer to; cached_blocks: kept beyond these; wanted_blocks: that the prompts
            of waiting requests need; reachable_blocks: that there are.
        kv_tokens: stored tokens of requests that decode.
        activation_bytes: of the step under way; token_budget: most tokens of it.
        host_bytes: taken in the host buffer.
    """

    running: int
    waiting: int
    used_blocks: int
    cached_blocks: int
    wanted_blocks: int
    reachable_blocks: int
    kv_tokens: int
    activation_bytes: int
    token_budget: int
    preemptions: int
    host_bytes: int


@dataclass(slots=True)
class _Run:
    """Steps under way."""

    started_s: float
    steps: int
    work: StepWork
    chunks: list[tuple[EngineRequest, int]]


@dataclass(slots=True)
class Progress:
    """What ended with a run: requests that got their first token, and that are done."""

    at_s: float
    started: list[EngineRequest]
    finished: list[EngineRequest]


class EngineModel:
    """One engine. Used by one thread; ``now_s`` never falls.

    Args:
        prefix_block_tokens: of a request's prefix blocks, a multiple of the profile's KV block.

    Attributes:
        next_event_s: when ``advance`` has to be called next; infinite while there is nothing to do.
        slowness: factor on the time of steps that begin from now on.
    """

    def __init__(self, profile: EngineProfile, prefix_block_tokens: int = 512) -> None:
        each, rest = divmod(prefix_block_tokens, profile.memory.block_tokens)
        assert each > 0 and not rest, "a prefix block is whole KV blocks"
        self.profile = profile
        self.next_event_s = math.inf
        self.slowness = 1.0
        self.preemptions = 0
        self._each, self._prefix_tokens = each, prefix_block_tokens
        self._block_tokens = profile.memory.block_tokens
        self._capacity = profile.kv_blocks
        self._token_budget = profile.max_num_batched_tokens
        self._active = profile.max_num_seqs
        self._cache = PrefixCache(each, profile.host.bytes // profile.memory.block_bytes)
        self._batch = DecodeBatch(self._block_tokens)
        self._waiting: deque[EngineRequest] = deque()
        self._running: dict[int, EngineRequest] = {}
        self._prefilling: dict[int, EngineRequest] = {}
        self._own_blocks = 0
        """KV blocks of requests that are no shared prefix."""
        self._blocked = False
        self._load_s = 0.0
        self._run: _Run | None = None

    def apply(self, target: ReplicaTarget) -> None:
        """Bounds from the next step on; as in the engine, never below what is running."""
        own = self.profile
        tokens, active = target.token_budget_max, target.active_max
        self._token_budget = min(tokens, own.max_num_batched_tokens) if tokens else own.max_num_batched_tokens
        self._active = min(active, own.max_num_seqs) if active else own.max_num_seqs
        self._blocked = False

    def submit(self, request: EngineRequest, now_s: float) -> None:
        """Queue a request. Raises ValueError for one that the engine can never hold."""
        if request.prompt_tokens + request.output_tokens > self.profile.max_model_len:
            raise ValueError(
                f"{request.prompt_tokens} + {request.output_tokens} tokens are more than the engine's "
                f"{self.profile.max_model_len}"
            )
        self._waiting.append(request)
        if self._run is None:
            self._begin(now_s)
        elif self._run.steps > 1 and not self._blocked and len(self._running) < self._active:
            self._cut(self._run, now_s)

    @property
    def requests(self) -> Iterator[EngineRequest]:
        """Those that run, then those that wait, each in their order."""
        yield from self._running.values()
        yield from self._waiting

    def end_step(self, now_s: float) -> None:
        """The run under way ends with the step under way."""
        if self._run is not None and self._run.steps > 1:
            self._cut(self._run, now_s)

    def let_go(self, request: EngineRequest) -> bool:
        """A request that decodes leaves with what it has; False for another one. The step that begins now was sized
        with it."""
        if request.finishes < 0 or request.request_id not in self._running:
            return False
        self._leave(request)
        self._blocked = False
        return True

    def cancel(self, request: EngineRequest) -> None:
        """Give a request up; one that is not here is passed over. It may still be part of the steps under way."""
        if request.request_id in self._running:
            self._leave(request)
            self._blocked = False
        elif request in self._waiting:
            self._waiting.remove(request)

    def advance(self) -> Progress:
        """End the run under way, at ``next_event_s``, and begin the next."""
        run, now_s = self._run, self.next_event_s
        assert run is not None
        batch = self._batch
        if batch.rows:
            self._own_blocks += batch.new_blocks(run.steps)
        finished = batch.advance(run.steps) if batch.rows else []
        for request in finished:
            self._settle(request)
        started: list[EngineRequest] = []
        for request, tokens in run.chunks:
            if request.request_id not in self._prefilling:
                continue  # displaced or cancelled meanwhile
            request.computed += tokens
            if request.computed == request.known_tokens:
                if not request.generated:
                    request.first_token_s = now_s
                    started.append(request)
                if self._first_decode(request):
                    finished.append(request)
        for request in finished:
            request.finished_s = now_s
        if finished:
            self._blocked = False
        self._begin(now_s)
        return Progress(now_s, started, finished)

    def drain(self) -> list[EngineRequest]:
        """The engine dies: every request it had, and an empty engine with cold caches."""
        lost = [*self._running.values(), *self._waiting]
        fresh = EngineModel(self.profile, self._prefix_tokens)
        fresh.preemptions = self.preemptions
        vars(self).update(vars(fresh))
        return lost

    def counts(self) -> EngineCounts:
        """The numbers of a report."""
        memory, run = self.profile.memory, self._run
        tokens = run.work.tokens + run.work.rows if run is not None else 0
        return EngineCounts(
            running=len(self._running),
            waiting=len(self._waiting),
            used_blocks=self._used,
            cached_blocks=self._cache.idle_blocks,
            wanted_blocks=sum(memory.request_blocks(request.known_tokens) for request in self._waiting),
            reachable_blocks=self._capacity,
            kv_tokens=self._batch.kv_tokens,
            activation_bytes=memory.activation_bytes(tokens) if tokens else 0,
            token_budget=self._token_budget,
            preemptions=self.preemptions,
            host_bytes=self._cache.host_used_blocks * memory.block_bytes,
        )

    def last_step(self) -> tuple[StepWork, float] | None:
        """Work and seconds of the first step of the run under way; None while the engine is idle."""
        if self._run is None:
            return None
        return self._run.work, self._seconds(self._run.work, 1)

    def check_conservation(self) -> None:
        """Raise AssertionError unless what requests hold is what is counted; for tests."""
        own = sum(self._blocks_of(request) for request in self._running.values())
        assert own == self._own_blocks, (own, self._own_blocks)
        assert self._used <= self._capacity, (self._used, self._capacity)
        assert self._used + self._cache.idle_blocks <= self._capacity

    @property
    def _used(self) -> int:
        return self._own_blocks + self._cache.held_blocks

    @property
    def _obtainable(self) -> int:
        """KV blocks that are free, or only kept."""
        return self._capacity - self._used

    def _begin(self, now_s: float) -> None:
        """The next run, if there is anything to do."""
        batch = self._batch
        self._load_s = 0.0
        displaced = False
        while batch.rows and batch.new_blocks(1) > self._obtainable:
            self._displace()
            displaced = True
        chunks, tokens, pairs = self._prompts(admits=not displaced)
        work = StepWork(batch.rows, batch.kv_tokens, tokens, pairs)
        if chunks:
            steps = 1
        elif batch.rows:
            steps = batch.steps_within(self._obtainable, batch.steps_to_end)
        else:
            self._run, self.next_event_s = None, math.inf
            return
        if batch.rows:
            self._free(batch.new_blocks(steps), tokens + batch.rows)
        self._run = _Run(now_s, steps, work, chunks)
        self.next_event_s = now_s + self._load_s + self._seconds(work, steps)

    def _cut(self, run: _Run, now_s: float) -> None:
        """End a run of decodes with the step that is under way."""
        elapsed_s = max(0.0, now_s - run.started_s) / self.slowness
        whole = self.profile.step_time.decodes_within(run.work.rows, run.work.kv_tokens, elapsed_s)
        if whole + 1 < run.steps:
            run.steps = whole + 1
            self.next_event_s = max(now_s, run.started_s + self._seconds(run.work, run.steps))

    def _seconds(self, work: StepWork, steps: int) -> float:
        if work.tokens:
            return self.slowness * self.profile.step_time.seconds(work)
        return self.slowness * self.profile.step_time.decode_s(work.rows, work.kv_tokens, steps)

    def _prompts(self, admits: bool) -> tuple[list[tuple[EngineRequest, int]], int, float]:
        """Chunks of the next step, their tokens and pairs. Admits waiting requests if it may."""
        rows = self._batch.rows
        budget = self._most_tokens(rows) - rows
        most = self._most_of_a_prompt(budget) if admits or self._prefilling else budget
        chunks: list[tuple[EngineRequest, int]] = []
        total, pairs = 0, 0.0
        for request in self._prefilling.values():
            tokens = min(request.known_tokens - request.computed, most, self._beside(budget, total))
            if tokens <= 0:
                break
            chunks.append((request, tokens))
            pairs += prompt_pairs(request.computed, tokens)
            total += tokens
        while admits and self._waiting and total < budget and len(self._running) < self._active:
            request = self._waiting[0]
            if not self._admit(request):
                self._blocked = True
                break
            self._waiting.popleft()
            tokens = min(request.known_tokens - request.computed, most, self._beside(budget, total))
            if tokens > 0:
                chunks.append((request, tokens))
                pairs += prompt_pairs(request.computed, tokens)
                total += tokens
        if chunks:
            self._free(0, total + self._batch.rows)
        return chunks, total, pairs

    def _most_tokens(self, rows: int) -> int:
        """Of the coming step, as the engine's scheduler bounds it."""
        own = self.profile.max_num_batched_tokens
        if not self.profile.elastic:
            return beside_decodes(self._token_budget, own, rows)
        return most_tokens(self._token_budget, own, self.profile.step_time, rows, self._batch.kv_tokens)

    def _most_of_a_prompt(self, budget: int) -> int:
        """Tokens that one prompt may take of a step: all of ``budget``, or its fair share where a target makes steps
        short."""
        if self._token_budget >= self.profile.max_num_batched_tokens:
            return budget
        places = 0 if self._blocked else self._active - len(self._running)
        coming = islice(self._waiting, max(0, places))
        return fair_share((one.known_tokens - one.computed for one in (*self._prefilling.values(), *coming)), budget)

    def _beside(self, budget: int, taken: int) -> int:
        """Tokens that the step may still compute: what the budget and, elastic, the activations' room leave."""
        left = budget - taken
        if self.profile.elastic and left > 0:
            room = self.profile.memory.step_tokens(self.profile.device_bytes, self._used + 1)
            left = min(left, room - self._batch.rows - taken)
        # Somebody must go on: the smallest step fits, but for rounding.
        return left if left > 0 or taken or self._batch.rows else 1

    def _admit(self, request: EngineRequest) -> bool:
        """Give a waiting request its KV blocks; False where they are not there."""
        cache, known = self._cache, request.known_tokens
        ids = request.prefix[: (known - 1) // self._prefix_tokens]
        device, host = cache.match(ids)
        blocks = -(-known // self._block_tokens) - device * self._each
        # What this step's decodes are about to take; the elastic scheduler leaves the next ones theirs as well.
        ahead = self._batch.rows if self.profile.elastic else self._batch.new_blocks(1)
        if blocks + ahead > self._obtainable - cache.idle_among(ids[:device]):
            return False
        cache.hold(ids[:device])
        self._free(blocks, self._batch.rows)
        request.held = device
        request.computed = min((device + host) * self._prefix_tokens, known - 1)
        loaded = host * self._prefix_tokens
        if request.kv_there:
            loaded, request.computed = 0, known - 1
        elif request.preemptions and cache.take_back(-1 - request.request_id) and device + host == len(ids):
            loaded = max(0, known - 1 - device * self._prefix_tokens)
            request.computed = known - 1
        self._load_s += loaded * self.profile.kv_token_bytes / self.profile.host.bytes_per_s
        if not request.preemptions and not request.kv_there:
            request.hit_tokens = request.computed
        request.kv_there = False
        self._own_blocks += blocks
        self._running[request.request_id] = self._prefilling[request.request_id] = request
        return True

    def _first_decode(self, request: EngineRequest) -> bool:
        """Its prompt is computed and its next token there: its prefix is shared from now on. True where it is done."""
        del self._prefilling[request.request_id]
        whole = min(len(request.prefix), request.prompt_tokens // self._prefix_tokens)
        shared = request.prefix[request.held : whole]
        before = self._cache.held_blocks + self._cache.idle_blocks
        self._cache.hold(shared)
        # Those that another request has computed meanwhile are there only once from now on.
        assert self._cache.held_blocks + self._cache.idle_blocks - before <= len(shared) * self._each
        request.held += len(shared)
        self._own_blocks -= len(shared) * self._each
        request.generated += 1
        if request.generated >= request.output_tokens:
            self._settle(request)
            return True
        self._batch.add(request)
        return False

    def _settle(self, request: EngineRequest) -> None:
        """Take back what a request held that is neither in the batch nor computing any more."""
        del self._running[request.request_id]
        self._own_blocks -= self._blocks_of(request)
        self._cache.release(request.prefix[: request.held])
        request.held = 0

    def _blocks_of(self, request: EngineRequest) -> int:
        """KV blocks of a running request that are no shared prefix."""
        if request.request_id in self._prefilling:
            stored = request.known_tokens
        else:
            decoded = self._batch.steps - request.joined if request.finishes >= 0 else 0
            stored = request.known_tokens - 1 + decoded
        return -(-stored // self._block_tokens) - request.held * self._each

    def _leave(self, request: EngineRequest) -> None:
        """Take a running request out, wherever it is."""
        if request.finishes >= 0:
            self._batch.remove(request)
        own = self._blocks_of(request)
        self._prefilling.pop(request.request_id, None)
        del self._running[request.request_id]
        self._own_blocks -= own
        self._cache.release(request.prefix[: request.held])
        request.held = 0

    def _displace(self) -> None:
        """Preempt the request that was admitted last."""
        request = next(reversed(self._running.values()))
        decoding = request.finishes >= 0
        own = self._blocks_of(request)
        self._leave(request)
        if decoding and self.profile.host.bytes:
            self._cache.store(-1 - request.request_id, own)
        request.preemptions += 1
        request.computed = 0
        self.preemptions += 1
        self._waiting.appendleft(request)

    def _free(self, blocks: int, tokens: int) -> None:
        """Push kept blocks out until ``blocks`` are free beside a step of ``tokens``."""
        limit = self._capacity
        if self.profile.elastic:
            limit = self.profile.memory.blocks(self.profile.device_bytes, tokens) - 1
        missing = self._used + self._cache.idle_blocks + blocks - limit
        if missing > 0:
            self._cache.push_out(missing)
