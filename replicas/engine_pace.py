"""How fast an engine is, as its scheduler sees it: a model of its steps' time, and how its requests fare.

    scheduled   1     2          3                      4          time -->
    tokens          1          2          3                    4
    step            |---- 2 ---|--- 3 ----|             |-- 4 -|   a step lasts from the tokens of the one before to its
                                                                   own, or from its scheduling where the engine was idle

That holds with asynchronous scheduling too, where a step is scheduled while the one before is computed. Pure: ``now_s``
is of one monotonic clock.
"""

import math
from collections import Counter, deque
from dataclasses import dataclass
from itertools import islice

from memory_agent.lease_board import EngineWord, Row
from replicas.elastic_prefill import Objectives
from replicas.step_time import StepTime, StepTimeModel, StepWork
from replicas.tpot_tail import TpotTail

RequestId = str | int

_SOLVE_EVERY = 8
ENOUGH_STEPS = 20
"""Steps from which their model is told."""
_ENOUGH_TOKENS = 8
"""Tokens from which an answer's pace counts before its end."""
_LOOKED_AT = 64
"""Of the requests that wait for their first token, the oldest, which are looked at."""
_PROMPT_MEMORY = 0.95
_RATE_MEMORY_S = 30.0
_PARTS = (EngineWord.STEP_S, EngineWord.ROW_S, EngineWord.KV_TOKEN_S, EngineWord.TOKEN_S, EngineWord.PAIR_S)


@dataclass(slots=True)
class _Answer:
    """Tokens of a request so far, and when the first and the newest of them came."""

    first_s: float
    newest_s: float
    tokens: int

    @property
    def tpot_s(self) -> float:
        return (self.newest_s - self.first_s) / (self.tokens - 1)


class EnginePace:
    """Lives in the scheduler's process; not thread-safe. The order of calls is that of the engine: ``begin`` for every
    step that is scheduled, ``end`` for each of them in the same order, ``answer`` for what it brought, ``rest``."""

    def __init__(self) -> None:
        self._model = StepTimeModel(StepTime(0.0), _SOLVE_EVERY)
        self._begun: deque[tuple[float, StepWork]] = deque()
        self._ended_s = -math.inf
        self._busy = False
        self._objectives: dict[RequestId, Objectives] = {}
        self._tpot_targets_s: Counter[float] = Counter()
        """Of these, how many have which."""
        self._arrived_s: dict[RequestId, float] = {}
        """Of requests without a token, in order."""
        self._answers: dict[RequestId, _Answer] = {}
        self._tail = TpotTail()
        self._prompt_tokens = self._prompt_squares = 0.0
        self._computed, self._computed_s = 0.0, -math.inf
        """Tokens of prompts, each counting for less the older it is, as of then."""
        self._shown: StepTime | None = None

    @property
    def step_time(self) -> StepTime | None:
        """None until enough steps have been seen."""
        return self._model.step_time if self._model.observed >= ENOUGH_STEPS else None

    def tpot_s(self, now_s: float) -> float:
        """The time per token that one answer in ten exceeds, of those that run and that ended lately, with the waits of
        preempted ones; 0 where there are none."""
        running = (one.tpot_s for one in self._answers.values() if one.tokens >= _ENOUGH_TOKENS)
        return self._tail.seconds(now_s, running)

    @property
    def tpot_target_s(self) -> float:
        """The tightest objective for it of the requests that are here; infinite where none has one."""
        return min(self._tpot_targets_s, default=math.inf)

    def ttft_share(self, now_s: float) -> float:
        """Of its objective for the first token, what a request that waits for it has used: the most of the oldest ones;
        0 where nobody waits."""
        waiting = islice(self._arrived_s.items(), _LOOKED_AT)
        return max(((now_s - at_s) / self._objectives[one].ttft_s for one, at_s in waiting), default=0.0)

    @property
    def prompt_tokens(self) -> float:
        """Of a prompt, mean of the recent ones; 0 before the first."""
        return self._prompt_tokens

    @property
    def prompt_of_token(self) -> float:
        """Tokens of the prompt that a prompt's token is in, mean over the tokens of the recent prompts."""
        return self._prompt_squares / self._prompt_tokens if self._prompt_tokens else 0.0

    def prompt_rate(self, now_s: float) -> float:
        """Tokens of prompts that were computed a second, over about the last half minute."""
        return self._computed * math.exp((self._computed_s - now_s) / _RATE_MEMORY_S) / _RATE_MEMORY_S

    def compute(self, tokens: int, now_s: float) -> None:
        """So many tokens of prompts have been computed."""
        self._computed = self.prompt_rate(now_s) * _RATE_MEMORY_S + tokens
        self._computed_s = now_s

    def arrive(self, request_id: RequestId, prompt_tokens: int, objectives: Objectives, now_s: float) -> None:
        """A request has come. An objective that it has not is infinite."""
        known = self._prompt_tokens or prompt_tokens
        squares = self._prompt_squares or prompt_tokens**2
        self._prompt_tokens = _PROMPT_MEMORY * known + (1 - _PROMPT_MEMORY) * prompt_tokens
        self._prompt_squares = _PROMPT_MEMORY * squares + (1 - _PROMPT_MEMORY) * prompt_tokens**2
        self._objectives[request_id] = objectives
        self._tpot_targets_s[objectives.tpot_s] += 1
        self._arrived_s[request_id] = now_s

    def begin(self, now_s: float, work: StepWork) -> None:
        """A step of ``work``, which may be none, begins to be scheduled."""
        self._begun.append((now_s, work))

    def end(self, now_s: float) -> None:
        """The tokens of the step that was scheduled first have come."""
        began_s, work = self._begun.popleft()
        if self._busy or began_s < self._ended_s:
            began_s = self._ended_s
        self._ended_s = now_s
        if work.rows or work.tokens:
            self._model.observe(work, now_s - began_s)
        if work.tokens:
            self.compute(work.tokens, now_s)

    def answer(self, request_id: RequestId, tokens: int, now_s: float) -> None:
        """So many new tokens of a request have come."""
        known = self._answers.get(request_id)
        if known is None:
            self._arrived_s.pop(request_id, None)
            self._answers[request_id] = _Answer(now_s, now_s, tokens)
            return
        known.newest_s = now_s
        known.tokens += tokens

    def rest(self, busy: bool) -> None:
        """The step's output has been dealt with; ``busy``: another one follows at once."""
        self._busy = busy

    def forget(self, request_id: RequestId) -> None:
        """The request has ended."""
        objectives = self._objectives.pop(request_id, None)
        if objectives is not None:
            self._tpot_targets_s[objectives.tpot_s] -= 1
            if not self._tpot_targets_s[objectives.tpot_s]:
                del self._tpot_targets_s[objectives.tpot_s]
        self._arrived_s.pop(request_id, None)
        answer = self._answers.pop(request_id, None)
        if answer is not None and answer.tokens > 1:
            self._tail.ended(answer.tpot_s, answer.newest_s)

    def publish(self, row: Row, kv_tokens: int, now_s: float) -> None:
        """Write it on the board. ``kv_tokens``: of the running requests now."""
        row.set(EngineWord.KV_TOKENS, kv_tokens)
        row.set_float(EngineWord.TPOT_S, self.tpot_s(now_s))
        target_s = self.tpot_target_s
        row.set_float(EngineWord.TPOT_TARGET_S, target_s if target_s < math.inf else 0.0)
        row.set_float(EngineWord.TTFT_SHARE, self.ttft_share(now_s))
        row.set_float(EngineWord.PROMPT_TOKENS, self._prompt_tokens)
        row.set_float(EngineWord.PROMPT_OF_TOKEN, self.prompt_of_token)
        row.set_float(EngineWord.PROMPT_RATE, self.prompt_rate(now_s))
        step_time = self.step_time
        if step_time is not None and step_time is not self._shown:
            self._shown = step_time
            for word, seconds in zip(_PARTS, step_time.parts, strict=True):
                row.set_float(word, seconds)
