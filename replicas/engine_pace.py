"""How fast an engine is, as its scheduler sees it: a model of its steps' time, and the time per output token lately.

    scheduled   1     2          3                      4          time -->
    tokens          1          2          3                    4
    step            |---- 2 ---|--- 3 ----|             |-- 4 -|   a step lasts from the tokens of the one before to its
                                                                   own, or from its scheduling where the engine was idle

That holds with asynchronous scheduling too, where a step is scheduled while the one before is computed. Pure: ``now_s``
is of one monotonic clock.
"""

import math
from collections import deque

from memory_agent.lease_board import EngineWord, Row
from replicas.step_time import StepTime, StepTimeModel, StepWork

_SOLVE_EVERY = 8
_ENOUGH_STEPS = 20
"""Steps from which their model is told."""
_TPOT_MEMORY_S = 3.0
_PROMPT_MEMORY = 0.95
_PARTS = (EngineWord.STEP_S, EngineWord.ROW_S, EngineWord.KV_TOKEN_S, EngineWord.TOKEN_S, EngineWord.PAIR_S)


class EnginePace:
    """Lives in the scheduler's process; not thread-safe. The order of calls is that of the engine: ``begin`` for every
    step that is scheduled, ``end`` for each of them in the same order, ``answer`` for what it brought."""

    def __init__(self) -> None:
        self._model = StepTimeModel(StepTime(0.0), _SOLVE_EVERY)
        self._begun: deque[tuple[float, StepWork]] = deque()
        self._ended_s = -math.inf
        self._busy = False
        self._newest_s: dict[str, float] = {}
        """When a request's newest token came."""
        self._gaps_s = self._gaps = 0.0
        self._gaps_at_s = 0.0
        self._tpot_targets_s: dict[str, float] = {}
        self._prompt_tokens = 0.0
        self._shown: StepTime | None = None

    @property
    def step_time(self) -> StepTime | None:
        """None until enough steps have been seen."""
        return self._model.step_time if self._model.observed >= _ENOUGH_STEPS else None

    @property
    def tpot_s(self) -> float:
        """From a token of a request to its next one, on average over the last seconds in which there were any; 0 before
        the first. The waits of preempted requests are in it."""
        return self._gaps_s / self._gaps if self._gaps else 0.0

    @property
    def tpot_target_s(self) -> float:
        """The tightest objective for it that a request here has of its own; 0 where none has."""
        return min(self._tpot_targets_s.values(), default=0.0)

    @property
    def prompt_tokens(self) -> float:
        """Of a prompt, mean of the recent ones; 0 before the first."""
        return self._prompt_tokens

    def arrive(self, request_id: str, prompt_tokens: int, tpot_target_s: float | None) -> None:
        """A request has come; None where it has no objective of its own."""
        known = self._prompt_tokens or prompt_tokens
        self._prompt_tokens = _PROMPT_MEMORY * known + (1 - _PROMPT_MEMORY) * prompt_tokens
        if tpot_target_s is not None:
            self._tpot_targets_s[request_id] = tpot_target_s

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

    def answer(self, request_id: str, tokens: int, now_s: float) -> None:
        """So many new tokens of a request have come, its first ones or later ones."""
        before_s = self._newest_s.get(request_id)
        self._newest_s[request_id] = now_s
        if before_s is None:
            return
        if now_s > self._gaps_at_s:
            kept = math.exp((self._gaps_at_s - now_s) / _TPOT_MEMORY_S)
            self._gaps_s *= kept
            self._gaps *= kept
            self._gaps_at_s = now_s
        self._gaps_s += now_s - before_s
        self._gaps += tokens

    def rest(self, busy: bool) -> None:
        """The step's output has been dealt with; ``busy``: another one follows at once."""
        self._busy = busy

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self._newest_s.pop(request_id, None)
        self._tpot_targets_s.pop(request_id, None)

    def publish(self, row: Row, kv_tokens: int) -> None:
        """Write it on the board. ``kv_tokens``: of the running requests now."""
        row.set(EngineWord.KV_TOKENS, kv_tokens)
        row.set_float(EngineWord.TPOT_S, self.tpot_s)
        row.set_float(EngineWord.TPOT_TARGET_S, self.tpot_target_s)
        row.set_float(EngineWord.PROMPT_TOKENS, self._prompt_tokens)
        step_time = self.step_time
        if step_time is not None and step_time is not self._shown:
            self._shown = step_time
            for word, seconds in zip(_PARTS, step_time.parts, strict=True):
                row.set_float(word, seconds)
