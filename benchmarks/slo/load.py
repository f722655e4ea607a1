"""The load: people who chat, and long documents that come in clumps. Its shape follows from a seed, its prompts from
the turn as well, so that no turn finds the prompts of another in a prefix cache.

    interactive   |  |    | | |   |    || |   |  | |    |  |       short prompts, tight targets
    batch             ###                 ##            ###        long prompts, loose targets

Targets and rates are multiples of what the engines' steps take, so that the load is the same on a faster machine.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.bench.report import LoadReport, Slo
from cluster.bench.workload import DEFAULT_VOCAB_SIZE, Request, Workload, block_tokens, random_stream
from replicas.step_time import StepTime

INTERACTIVE, BATCH = "interactive", "batch"
_INTERACTIVE_TOKENS, _INTERACTIVE_ANSWER = (24, 64), (16, 48)
_BATCH_TOKENS, _BATCH_ANSWER = (1500, 2500), (4, 12)
_CLUMP = 2
"""Documents that come together."""
_BATCH_SHARE = 0.3
"""Of the engines' time, what the prompts of documents take."""
_STEPS_BETWEEN_CHATS = 35.0
"""Steps of one engine in which it gets one short request."""
_TPOT_STEPS, _TTFT_STEPS = 7.0, 35.0
"""Targets of short requests, in steps that decode one request."""
_BATCH_TARGET_S = 30.0


@dataclass(frozen=True)
class Shape:
    """What the load is made for.

    Attributes:
        rates: requests a second, by class; targets: what each is promised.
    """

    rates: Mapping[str, float]
    targets: Mapping[str, Slo]

    @classmethod
    def of(cls, step: StepTime, engines: int) -> "Shape":
        """For engines whose steps take so long."""
        alone_s = step.decode_s(1, 100)
        document_s = step.prompt_s(sum(_BATCH_TOKENS) // 2, 2048)
        return cls(
            rates={
                INTERACTIVE: engines / (_STEPS_BETWEEN_CHATS * alone_s),
                BATCH: engines * _BATCH_SHARE / document_s,
            },
            targets={
                INTERACTIVE: Slo(ttft_ms=1000 * _TTFT_STEPS * alone_s, tpot_ms=1000 * _TPOT_STEPS * alone_s),
                BATCH: Slo(ttft_ms=1000 * _BATCH_TARGET_S, tpot_ms=1000 * _BATCH_TARGET_S / 10),
            },
        )

    def to_json(self) -> dict[str, Any]:
        return {
            name: {"rate": rate, "ttft_ms": self.targets[name].ttft_ms, "tpot_ms": self.targets[name].tpot_ms}
            for name, rate in self.rates.items()
        }


@dataclass(frozen=True)
class MixedLoad:
    """Requests with the times at which they come; ``classes``: of each."""

    work: Workload
    classes: Sequence[str]

    @classmethod
    def made(cls, shape: Shape, seconds: float, turn: int, factor: float = 1.0, seed: int = 5) -> "MixedLoad":
        """``factor`` times the shape's rates."""
        rng = random_stream(seed)
        coming = sorted(
            [(at_s, INTERACTIVE) for at_s in _times(rng, factor * shape.rates[INTERACTIVE], seconds)]
            + [
                (at_s, BATCH)
                for at_s in _times(rng, factor * shape.rates[BATCH] / _CLUMP, seconds)
                for _ in range(_CLUMP)
            ]
        )
        requests = [_request(rng, index, at_s, name, turn) for index, (at_s, name) in enumerate(coming)]
        settings = {"kind": "mixed", "seconds": seconds, "factor": factor, "seed": seed, "turn": turn}
        return cls(Workload(requests, settings), [name for _, name in coming])

    def kept(self, report: LoadReport, shape: Shape) -> dict[str, tuple[int, int]]:
        """Requests that kept all of their targets, and all requests, by class."""
        found = {name: [0, 0] for name in shape.targets}
        for record in report.records:
            count = found[self.classes[record.index]]
            count[0] += shape.targets[self.classes[record.index]].kept_by(record)
            count[1] += 1
        return {name: (kept, of) for name, (kept, of) in found.items()}


def _times(rng: np.random.Generator, rate: float, seconds: float) -> Iterator[float]:
    at_s = rng.exponential(1 / rate)
    while at_s < seconds:
        yield float(at_s)
        at_s += rng.exponential(1 / rate)


def _request(rng: np.random.Generator, index: int, at_s: float, name: str, turn: int) -> Request:
    short = name == INTERACTIVE
    tokens = int(rng.integers(*(_INTERACTIVE_TOKENS if short else _BATCH_TOKENS)))
    answer = int(rng.integers(*(_INTERACTIVE_ANSWER if short else _BATCH_ANSWER)))
    prompt = block_tokens(turn, np.full(tokens, index), np.arange(tokens), DEFAULT_VOCAB_SIZE)
    return Request(index, prompt, answer, arrival_s=at_s)
