"""The requests of an engine that decode together, advanced many steps at once. Pure.

Every step gives each of them one token, so what changes is the same for all: how many tokens are stored grows by the
rows, and a request takes a new KV block each time its own count passes a multiple of a block. Requests are sorted into
classes by the step at which they do (modulo a block), so neither needs a look at every request:

    step            0  1  2  3  4  5  6  7  8        block of 4 tokens
    A: 6 stored     .  .  +  .  .  .  +  .  .        class 2
    B: 4 stored     +  .  .  .  +  .  .  .  +        class 0
"""

import heapq
import itertools
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class EngineRequest:
    """One request of an engine model. The caller sets the first four; the rest is what becomes of it.

    Attributes:
        prefix: ids of the whole prefix blocks of its prompt.
        generated: tokens; hit_tokens: of its prompt, found in the prefix cache or the host buffer when it was first
            admitted.
        first_token_s, finished_s: when; negative before.
        preemptions: how often it made way.
        brought: tokens of its answer that it had when it was moved to the engine, and kv_there: with their KV, which
            the engine has not taken yet.
    """

    request_id: int
    prompt_tokens: int
    output_tokens: int
    prefix: tuple[int, ...] = ()
    generated: int = 0
    hit_tokens: int = 0
    first_token_s: float = -1.0
    finished_s: float = -1.0
    preemptions: int = 0
    brought: int = 0
    kv_there: bool = False
    computed: int = field(default=0, repr=False)
    held: int = field(default=0, repr=False)
    """Prefix blocks that it refers to."""
    joined: int = field(default=0, repr=False)
    finishes: int = field(default=-1, repr=False)
    """Steps of the batch at which it joined and is done; the latter is negative while it does not decode."""

    @property
    def known_tokens(self) -> int:
        """Prompt and output so far: what a prefill computes to go on."""
        return self.prompt_tokens + self.generated


class DecodeBatch:
    """Attributes: rows: requests; kv_tokens: stored tokens of all; steps: since the start."""

    def __init__(self, block_tokens: int) -> None:
        self.rows = 0
        self.kv_tokens = 0
        self.steps = 0
        self._block_tokens = block_tokens
        self._growing = [0] * block_tokens
        self._ends: list[tuple[int, int, int, EngineRequest]] = []
        self._joins = itertools.count()

    def add(self, request: EngineRequest) -> None:
        """It has a token that is not stored yet, and decodes from the next step on."""
        request.joined = self.steps
        request.finishes = self.steps + request.output_tokens - request.generated
        stored = request.known_tokens - 1
        self.rows += 1
        self.kv_tokens += stored
        self._growing[(self.steps - stored) % self._block_tokens] += 1
        heapq.heappush(self._ends, (request.finishes, request.request_id, next(self._joins), request))

    def remove(self, request: EngineRequest) -> None:
        """It stops where it is."""
        request.generated += self.steps - request.joined
        request.finishes = -1
        stored = request.known_tokens - 1
        self.rows -= 1
        self.kv_tokens -= stored
        self._growing[(self.steps - stored) % self._block_tokens] -= 1

    @property
    def steps_to_end(self) -> int:
        """Until the next request is done; there must be one."""
        ends = self._ends
        while ends[0][0] != ends[0][-1].finishes:  # removed meanwhile
            heapq.heappop(ends)
        return ends[0][0] - self.steps

    def new_blocks(self, steps: int) -> int:
        """KV blocks that the next ``steps`` steps take."""
        whole, rest = divmod(steps, self._block_tokens)
        at = self.steps % self._block_tokens
        if rest == 1:
            return whole * self.rows + self._growing[at]
        turned = self._growing[at : at + rest] + self._growing[: max(0, at + rest - self._block_tokens)]
        return whole * self.rows + sum(turned)

    def steps_within(self, blocks: int, most: int) -> int:
        """The most of the next ``most`` steps that take no more than ``blocks``."""
        if self.new_blocks(most) <= blocks:
            return most
        whole = blocks // self.rows
        left, steps = blocks - whole * self.rows, whole * self._block_tokens
        while left >= 0:
            left -= self._growing[(self.steps + steps) % self._block_tokens]
            steps += 1
        return steps - 1

    def advance(self, steps: int) -> list[EngineRequest]:
        """``steps`` steps, at most ``steps_to_end``; those that are done, removed."""
        self.steps += steps
        self.kv_tokens += self.rows * steps
        done: list[EngineRequest] = []
        while self._ends and self._ends[0][0] <= self.steps:
            finishes, _, _, request = heapq.heappop(self._ends)
            if finishes == request.finishes:
                self.remove(request)
                done.append(request)
        return done
