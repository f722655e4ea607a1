"""The target of every replica, from its reports: how the controller resizes batches. Pure.

    report --> objective (tightest TPOT of the model) --> BatchSizing --> ceilings --> a new revision where they moved
                                                              ^ another replica of the model has room

The settings' bounds are the most that a target allows. A replica that has not learned its step time yet gets just
these.

Revisions count from the wall clock at the start of a controller's life, in steps that no life can use up, so they lie
above those of all lives before it. A report of a higher one says that a later life acts, or that the clock was set
back. Until it is known which (``lead``), no target is given out.
"""

import math
from dataclasses import dataclass, field

from cluster.batch_sizing import BatchBounds, BatchObservation, BatchSizing, resumed
from cluster.config import ClusterConfig
from cluster.decision import Decision
from memory_agent.reports import EngineReport
from replicas.step_time import StepTime
from replicas.targets import ReplicaTarget

SIZE_EVERY_S = 1.0
_OBJECTIVE_S = 30.0
"""A request's objective counts for all replicas of its model so long: the next one may come to any of them."""
_ROOM_S = 3.0
"""A replica is taken to have room so long after the report that said so."""
_PROMPT_TOKENS = 512.0
"""Of a prompt, before the first has come."""
_REVISIONS_A_MS = 4096
"""More than a controller can give out; the clock's product with it stays below 2**53, which JSON carries exactly."""


@dataclass(frozen=True)
class TargetSettings:
    """What targets keep to. Plain data: it crosses processes.

    Attributes:
        token_budget_max, active_max: the most tokens of a step, and requests at once; 0 leaves the engine's own.
        batch_sizing: whether they are bounded further so that TPOT targets are kept.
        tpot_s: the tightest TPOT target of the classes, for requests that bring none of their own.
        migration: whether requests move from replicas that are full or late to others.
    """

    token_budget_max: int = 0
    active_max: int = 0
    batch_sizing: bool = True
    tpot_s: float = math.inf
    migration: bool = False

    @classmethod
    def of(cls, config: ClusterConfig) -> "TargetSettings":
        """Of a cluster's configuration."""
        bounds = config.controller
        tightest_s = min(one.tpot_ms for one in config.slo) / 1000
        return cls(bounds.token_budget_max, bounds.active_max, bounds.batch_sizing, tightest_s, bounds.migration)


@dataclass
class _Engine:
    """What is remembered of one engine."""

    target: ReplicaTarget
    sizing: BatchSizing | None = None
    sized_s: float = -math.inf
    tpot_s: float = 0.0


@dataclass
class _Model:
    """What the replicas of a model know of each other.

    Attributes:
        objectives_s: TPOT targets of requests, and when one was seen last.
        room_s: engines that could take requests, and when they said so, the latest one last.
    """

    objectives_s: dict[float, float] = field(default_factory=dict)
    room_s: dict[str, float] = field(default_factory=dict)

    def objective_s(self, engine: EngineReport, default_s: float, now_s: float) -> float:
        """The tightest TPOT target of requests seen lately."""
        if engine.tpot_target_s:
            self.objectives_s[engine.tpot_target_s] = now_s
        for target_s in [one for one, at_s in self.objectives_s.items() if now_s - at_s > _OBJECTIVE_S]:
            del self.objectives_s[target_s]
        return min(self.objectives_s, default=default_s)

    def has_room(self, engine_id: str, room: bool, now_s: float) -> None:
        self.room_s.pop(engine_id, None)
        if room:
            self.room_s[engine_id] = now_s

    def room_elsewhere(self, engine_id: str, now_s: float) -> bool:
        other = next((one for one in reversed(self.room_s) if one != engine_id), None)
        return other is not None and now_s - self.room_s[other] <= _ROOM_S


class TargetPlanner:
    """``now_s`` is monotonic seconds of one clock; epoch_ms: wall clock at the start of this life."""

    def __init__(self, settings: TargetSettings, epoch_ms: int) -> None:
        self.settings = settings
        self._last = epoch_ms * _REVISIONS_A_MS
        """The last revision that was given out."""
        self._rival = 0
        self._engines: dict[str, _Engine] = {}
        self._models: dict[str, _Model] = {}

    @property
    def superseded(self) -> bool:
        """A report has named a target of a later life of the controller."""
        return self._rival > self._last

    def lead(self) -> None:
        """There is no later life, whatever clocks say: go on above what it has given out."""
        self._last = max(self._last, self._rival)

    def target_for(self, engine_id: str) -> ReplicaTarget | None:
        """None while no report has named the engine, or while another controller may act."""
        engine = self._engines.get(engine_id)
        return engine.target if engine is not None and not self.superseded else None

    def requests_for(self, engine: EngineReport) -> int:
        """How many requests routers are to give the engine at once: those that it runs at most, or fewer where it is
        late and another one has room."""
        known = self._engines.get(engine.engine_id)
        given = known.sizing.given.value if known is not None and known.sizing is not None else 0
        return min((one for one in (engine.max_num_seqs, engine.active_max, given) if one), default=0)

    def forget(self, engine: EngineReport) -> None:
        """The engine has gone."""
        self._engines.pop(engine.engine_id, None)
        if (model := self._models.get(engine.model)) is not None:
            model.room_s.pop(engine.engine_id, None)

    def plan(self, engine: EngineReport, now_s: float) -> Decision | None:
        """Take in a fresh report. Returns what was decided, None where the target stays."""
        self._rival = max(self._rival, engine.target_revision)
        if self.superseded:
            return None
        known = self._engines.get(engine.engine_id)
        if known is None:
            known = self._engines[engine.engine_id] = _Engine(ReplicaTarget(0))
        step_time = step_time_of(engine) if self.settings.batch_sizing else None
        if step_time is None or not engine.max_num_seqs:
            return self._decide(engine, known, self._bounds_alone(), "the bounds of the configuration", {})
        if now_s - known.sized_s < SIZE_EVERY_S:
            return None
        known.sized_s = now_s
        return self._size(engine, known, step_time, now_s)

    def _size(self, engine: EngineReport, known: _Engine, step_time: StepTime, now_s: float) -> Decision | None:
        seen = self._observe(engine, known, now_s)
        settings = self.settings
        bounds = BatchBounds(
            min(engine.max_num_seqs, settings.active_max or engine.max_num_seqs),
            min(engine.max_num_batched_tokens, settings.token_budget_max or engine.max_num_batched_tokens),
        )
        before = known.sizing
        if before is None:
            before = resumed(engine.token_budget_max, engine.active_max, seen, step_time, bounds)
        sizing = known.sizing = before.next(seen, step_time, bounds, now_s)
        room = seen.calm and engine.running + engine.waiting < sizing.active.value
        self._models[engine.model].has_room(engine.engine_id, room, now_s)
        inputs = {
            "running": seen.running,
            "waiting": engine.waiting,
            "kv_tokens": seen.kv_tokens,
            "tpot_ms": round(1000 * engine.tpot_s, 3),
            "tpot_target_ms": round(1000 * seen.tpot_target_s, 3),
            "goal_ms": round(1000 * sizing.factor * seen.tpot_target_s, 3),
            "ttft_share": round(engine.ttft_share, 3),
            "decode_ms": round(1000 * step_time.decode_s(seen.running, seen.kv_tokens), 3),
            "prompt_rate": round(engine.prompt_rate, 1),
            "prompt_token_ms": round(1000 * step_time.token_s, 4),
        }
        wanted = sizing.tokens.value, sizing.active.value
        decision = self._decide(engine, known, wanted, _reason(seen, sizing), inputs)
        if decision is None and sizing.given.value != before.given.value and before.given.value:
            decision = Decision("shift", engine.engine_id, _shift(sizing), _reason(seen, sizing), inputs)
        return decision

    def _observe(self, engine: EngineReport, known: _Engine, now_s: float) -> BatchObservation:
        """The engine as sizing sees it. A measured TPOT counts once: an engine that stands still measures none."""
        model = self._models.setdefault(engine.model, _Model())
        new = engine.running > 0 and engine.tpot_s not in (0.0, known.tpot_s)
        known.tpot_s = engine.tpot_s
        return BatchObservation(
            running=engine.running,
            kv_tokens=engine.kv_tokens,
            tpot_s=engine.tpot_s if new else math.nan,
            tpot_target_s=model.objective_s(engine, self.settings.tpot_s, now_s),
            prompt_tokens=engine.prompt_tokens or _PROMPT_TOKENS,
            prompt_of_token=engine.prompt_of_token or _PROMPT_TOKENS,
            prompt_rate=engine.prompt_rate,
            ttft_share=engine.ttft_share,
            room_elsewhere=model.room_elsewhere(engine.engine_id, now_s),
        )

    def _bounds_alone(self) -> tuple[int, int]:
        return self.settings.token_budget_max, self.settings.active_max

    def _decide(
        self, engine: EngineReport, known: _Engine, wanted: tuple[int, int], reason: str, inputs: dict[str, float]
    ) -> Decision | None:
        """A new revision where the target changes, and where the replica has one of a former life."""
        tokens, active = wanted
        old = known.target
        newest = old.revision and old.revision >= engine.target_revision
        if newest and (tokens, active) == (old.token_budget_max, old.active_max):
            return None
        self._last += 1
        known.target = ReplicaTarget(self._last, tokens, active)
        action = f"{tokens or 'own'} tokens a step, {active or 'own'} requests"
        return Decision("target", engine.engine_id, action, reason, inputs)


def step_time_of(engine: EngineReport) -> StepTime | None:
    """What the engine has learned of its steps; None before."""
    parts = StepTime(engine.step_s, engine.row_s, engine.kv_token_s, engine.token_s, engine.pair_s)
    return parts if any(parts.parts) else None


def _shift(sizing: BatchSizing) -> str:
    return f"{sizing.given.value} of at most {sizing.active.value} requests from routers"


def _reason(seen: BatchObservation, sizing: BatchSizing) -> str:
    target_ms = 1000 * seen.tpot_target_s
    if sizing.hopeless:
        return f"no step is short enough to keep {target_ms:.0f} ms a token beside these prompts: best effort"
    if seen.hurried:
        return f"a prompt has waited for {seen.ttft_share:.0%} of its TTFT target: longer steps compute more"
    if seen.late and seen.room_elsewhere:
        return f"{1000 * seen.tpot_s:.0f} ms a token instead of {target_ms:.0f}, another replica has room"
    if seen.late:
        return f"{1000 * seen.tpot_s:.0f} ms a token instead of {target_ms:.0f}"
    return f"steps of {1000 * sizing.factor * seen.tpot_target_s:.0f} ms keep {target_ms:.0f} ms a token"
