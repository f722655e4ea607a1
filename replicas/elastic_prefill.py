"""Prompts are computed before there is memory to decode them: eLLM's elastic buffer, for vLLM's scheduler.

    newcomer  --prefill, first token-->  running  --set aside, KV to the host buffer-->  set aside  --loaded-->  running

When the first waiting prompt does not fit, running requests that already have a token are set aside for it: those that
can wait longest within their objective for the tokens after the first. Their blocks go to the host buffer when others
need the memory, and are loaded when memory is free again. How many blocks may be set aside is the logical size: it
doubles when first tokens are late and halves when the tokens after them are.

Pure: no clock, no vLLM.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from memory_agent.logical_size import LogicalSize, SloSample
from replicas.answer_pace import AnswerPace

_SOON = 0.2
"""Share of the objective for the first token after which a waiting prompt is worth setting others aside for."""
_PAUSE = 0.5
"""Who is set aside can wait for this share of that objective at least, and still keep its own for the tokens after."""


@dataclass(frozen=True)
class Claim:
    """A request and the KV blocks that it needs, or holds."""

    request_id: str
    blocks: int


@dataclass(frozen=True)
class Line:
    """The scheduler's queues at the start of a step.

    Attributes:
        free_blocks: that the lease leaves beyond what running requests will need soon.
        newcomer: the first waiting request that has no token yet.
        aside: requests that were set aside, oldest first.
        movable: running ones that may be set aside, in the order in which they are.
        running: some request runs.
    """

    free_blocks: int
    newcomer: Claim | None
    aside: Sequence[Claim]
    movable: Sequence[Claim]
    running: bool


@dataclass(frozen=True)
class Choice:
    """What to do before the step: set aside ``displace``, in this order; of those set aside before, let only ``resume``
    in; where anybody stays aside, let no newcomer in but ``admit``."""

    displace: Sequence[str]
    resume: Sequence[str]
    admit: str | None


def choose(line: Line, logical_blocks: int) -> Choice:
    """A newcomer goes before those set aside as long as these, with it, stay within the logical size; then they go
    first, and it waits."""
    before = sum(claim.blocks for claim in line.aside)
    displaced, free = _way_for(line, logical_blocks - before)
    admit = None
    if line.newcomer is not None and line.newcomer.blocks <= free:
        after = before + sum(claim.blocks for claim in displaced) + line.newcomer.blocks
        if line.aside and after > logical_blocks:
            displaced, free = [], line.free_blocks
        else:
            admit = line.newcomer.request_id
            free -= line.newcomer.blocks
    resume: list[str] = []
    for claim in line.aside:
        alone = not line.running and admit is None and not resume
        if claim.blocks > free and not alone:
            break
        resume.append(claim.request_id)
        free -= claim.blocks
    return Choice([claim.request_id for claim in displaced], resume, admit)


def _way_for(line: Line, room_blocks: int) -> tuple[list[Claim], int]:
    """Who must be set aside so that the newcomer fits, and the blocks that are free then; nobody where that does not
    help or is more than ``room_blocks``."""
    displaced: list[Claim] = []
    free = line.free_blocks
    if line.newcomer is None:
        return displaced, free
    for claim in line.movable:
        if line.newcomer.blocks <= free:
            break
        displaced.append(claim)
        free += claim.blocks
        room_blocks -= claim.blocks
    if line.newcomer.blocks > free or room_blocks < 0:
        return [], line.free_blocks
    return displaced, free


@dataclass(frozen=True)
class Objectives:
    """Seconds to the first token, and per token after it."""

    ttft_s: float
    tpot_s: float


class ElasticPrefill:
    """Who is set aside, and the logical size. Lives in the scheduler's process; not thread-safe.

    Args:
        floor_blocks: where halving the logical size ends; ceiling_blocks: of the host buffer, the size at first.
    """

    def __init__(self, objectives: Objectives, floor_blocks: int, ceiling_blocks: int) -> None:
        self._objectives = objectives
        self._size = LogicalSize(ceiling_blocks, floor_blocks, ceiling_blocks)
        self._pace = AnswerPace(objectives.tpot_s)
        self._arrived_at: dict[str, float] = {}
        self._aside: dict[str, None] = {}  # in the order in which they were set aside
        self._urgent = False
        self._choice = Choice(displace=[], resume=[], admit=None)
        self.displaced = 0
        """How often a request was set aside since the start."""

    @property
    def logical_blocks(self) -> int:
        return self._size.size

    @property
    def aside(self) -> Sequence[str]:
        """Request ids, oldest first."""
        return list(self._aside)

    def movable(self, request_ids: Iterable[str]) -> list[str]:
        """Those of the running requests that may be set aside, the ones that can wait longest first."""
        slack = {request_id: self._pace.slack_s(request_id) for request_id in request_ids}
        least_s = self._objectives.ttft_s * _PAUSE
        return sorted((one for one, slack_s in slack.items() if slack_s > least_s), key=lambda one: -slack[one])

    def arrive(self, request_id: str, now_s: float) -> None:
        """A request has come. One of which this is not told, of a warm-up, has no objective."""
        self._arrived_at[request_id] = now_s

    def observe(self, now_s: float, newcomer: str | None, tokens: Mapping[str, int]) -> None:
        """An iteration.

        Args:
            newcomer: the oldest request without a token, if one waits.
            tokens: output tokens so far of each request that has some and has not ended.
        """
        waiting_s = now_s - self._arrived_at.get(newcomer, now_s) if newcomer is not None else 0.0
        self._pace.observe(now_s, tokens)
        self._urgent = waiting_s > self._objectives.ttft_s * _SOON
        sample = SloSample(ttft=waiting_s > self._objectives.ttft_s, tpot=self._pace.late)
        self._size = self._size.sampled(sample, now_s)

    def decide(self, line: Line) -> Sequence[str]:
        """Decide about the coming step. Returns whom to set aside before it, in this order: nobody while the prompt has
        time left."""
        choice = choose(line, self.logical_blocks if self._urgent else 0)
        for request_id in choice.resume:
            del self._aside[request_id]
        self._choice = choice
        for request_id in choice.displace:
            self._aside[request_id] = None
        self.displaced += len(choice.displace)
        return choice.displace

    def holds(self, request_id: str, new: bool) -> bool:
        """Must this waiting request stay out of the coming step? ``new``: it has no token yet."""
        if request_id in self._aside:
            return True
        return new and bool(self._aside) and request_id != self._choice.admit

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self._aside.pop(request_id, None)
        self._arrived_at.pop(request_id, None)
        self._pace.forget(request_id)
